"""Bad input ends in one line that says what, got, allowed and what to do; exit code 2, no traceback."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from grpo.config.command_line import load_config
from grpo.config.documentation import field_docs
from grpo.config.settings import DEMO, Config
from grpo.errors import UserError
from tests.support.launcher import PROJECT, fork_script
from tests.support.tiny import save_tiny


def refused(argv, message):
    with pytest.raises(UserError) as caught:
        load_config(argv)
    text = str(caught.value)
    assert "\n" not in text and message in text, text
    assert caught.value.code == 2


@pytest.mark.parametrize(
    "args, message",
    [
        (["--lrr", "1"], "--lrr"),
        (["--lr", "fast"], "lr: must be a number, got 'fast' (see train.py --help)."),
        (["--lr", "nan"], "lr: must be a number, got 'nan'. It must be finite"),
        (["--lr=-1e-6"], "lr: must be a finite number > 0"),
        (["--num_generations", "1"], "num_generations: must be >= 2, got 1"),
        (["--batch_size", "0"], "batch_size: must be >= 1, got 0"),
        (["--batch_size", "2.5"], "batch_size"),
        (["--gradient_accumulation_steps", "-1"], "gradient_accumulation_steps: must be >= 1"),
        (["--max_steps", "-1"], "max_steps: must be >= 0"),
        (["--temperature", "0"], "temperature: must be"),
        (["--top_p", "1.5"], "top_p: must be in (0, 1]"),
        (["--top_k", "500"], "top_k: must be at most max_support 128"),
        (["--num_minibatches", "9"], "num_minibatches: at most one per prompt of a step, 8, got 9"),
        (["--dtype", "fp8"], "fp8"),
        (["--config", "nope.yaml"], "no such file 'nope.yaml'"),
        (["--model", "x"], "data: none given"),
        (["--data", "x"], "model: none given"),
        (["--model", "x", "--data", "y"], "rewards: none given"),
        (["--rewards", '{"mark_reward": 0}'], "every weight is 0"),
        (["--rewards", '{"mark_reward": "lots"}'], "rewards"),
        (["--gradient_checkpointing", "maybe"], "gradient_checkpointing"),
    ],
)
def test_settings(args, message):
    refused(args, message)


@pytest.mark.parametrize("text, message", [("lrr: 1", "lrr"), ("lr: [1", ""), ("lr: fast", "lr"), ("- 1", "")])
def test_config_files(tmp_path, text, message):
    (tmp_path / "c.yaml").write_text(text + "\n")
    refused(["--config", str(tmp_path / "c.yaml")], message)


def test_defaults_file_and_command_line_in_that_order(tmp_path):
    (tmp_path / "c.yaml").write_text("model: m\ndata: d\nrewards: {mark_reward: 1}\nlr: 1e-6\nbeta: 0.1\n")
    file = str(tmp_path / "c.yaml")
    for argv in (["--beta", "0.2", "--config", file], [f"--config={file}", "--beta=0.2"]):
        cfg, notice = load_config(argv)
        assert (cfg.lr, cfg.beta, cfg.num_generations, cfg.run_name, notice) == (1e-6, 0.2, 4, "c", None)


def test_documented_defaults():
    """What users of this family of trainers know."""
    known = dict(
        lr=1e-6,
        epoch=3,
        save_steps=100,
        num_generations=4,
        max_prompt_length=256,
        max_generate_length=256,
        beta=0.0,
        clip_eps=0.2,
        gradient_accumulation_steps=2,
        batch_size=1,
        output_dir="./output",
    )
    assert {key: getattr(Config(), key) for key in known} == known


def test_the_demo_applies_only_to_a_bare_command():
    cfg, notice = load_config(["--seed", "3"])
    assert notice and cfg.model == "demo/base" and cfg.seed == 3 and cfg.run_name == "demo"


@pytest.mark.parametrize("file", sorted(path.name for path in DEMO.parent.glob("*.yaml")))
def test_every_config_file_loads_and_uses_shipped_rewards(file):
    from grpo.rewards.pool import open_rewards

    cfg, _ = load_config(["--config", str(DEMO.parent / file), "--reward_workers", "0"])
    assert len(open_rewards(cfg, print).rewards) == len(cfg.rewards) > 0


def test_every_setting_is_documented_and_read():
    """No option without effect: each field is read somewhere outside config.py's own checks."""
    docs = field_docs()
    sources = "".join(p.read_text() for p in [*(PROJECT / "grpo").rglob("*.py"), PROJECT / "train.py"])
    for name in vars(Config()):
        assert docs.get(name), f"{name} has no docstring"
        assert f"cfg.{name}" in sources, f"{name} is read nowhere"


def test_print_config_shows_the_whole():
    done = fork_script("train.py", "--print_config", "--model", "X")
    assert done.returncode == 0 and "lr: 1.0e-06" in done.stdout and "model: X" in done.stdout


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_tiny(tmp_path_factory.mktemp("model")))


GOOD = {"question": "2+2?", "answer": "#### 4"}


@pytest.mark.parametrize(
    "rows, extra, message",
    [
        (None, [], "data: no such file"),
        ([], [], "is empty"),
        ([{"q": "2+2?", "answer": "#### 4"}], [], "has no column 'question', only ['q', 'answer']"),
        ([GOOD], ["--answer_column", "gold"], "has no column 'gold'"),
        ([GOOD, {"question": "3?", "answer": "three"}], [], "row 2, column 'answer': expected text with '#### answer'"),
        ([GOOD, {"question": "3?", "answer": None}], [], "row 2, column 'answer'"),
        ([GOOD, {"question": " ", "answer": "#### 1"}], [], "row 2, column 'question': expected a question"),
        (
            [{"question": "long " * 200, "answer": "#### 1"}],
            ["--max_prompt_length", "20"],
            "than max_prompt_length 20",
        ),
        ([GOOD], ["--prompt_template", "{level} {question}"], "has no column 'level'"),
        ([GOOD], ["--rewards", '{"best_reward": 1}'], "has no function 'best_reward'"),
        ([GOOD], ["--rewards", '{"gone.py:f": 1}'], "no such file 'gone.py'"),
        ([GOOD], ["--device", "cuda"], "PyTorch sees no GPU"),
        ([GOOD], ["--max_generate_length", "300"], "the model's 256 positions"),
        ([GOOD], ["--chat_template", "true"], "has none"),
        ([GOOD], ["--model", "./no/such/model"], "no such folder './no/such/model'"),
        ([GOOD], ["--model", "tests"], "holds no config.json"),
        ([GOOD], ["--resume", "must"], "holds no valid checkpoint"),
    ],
)
def test_data_rewards_and_models(model, tmp_path, rows, extra, message, capfd):
    """Run in this process: the same main as the script's, without starting Python each time."""
    import torch

    import train
    from grpo.run.main import run_main

    if "cuda" in extra and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    file = tmp_path / "rows.jsonl"
    if rows is not None:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = [
        "--model",
        model,
        "--data",
        str(file),
        "--answer_format",
        "hash",
        "--rewards",
        '{"final_answer_reward": 1}',
        "--output_dir",
        str(tmp_path / "output"),
        "--runs_dir",
        str(tmp_path / "runs"),
        "--max_steps",
        "1",
        "--max_prompt_length",
        "100",
        "--max_generate_length",
        "8",
    ]
    code = run_main(train.train, load_config, [*settings, *extra])
    error = capfd.readouterr().err.strip()
    assert code == 2 and message in error
    assert len([line for line in error.splitlines() if line.startswith("error: ")]) == 1 and "Traceback" not in error


def test_output_folder_that_cannot_be_written(tmp_path):
    """A file stands where the folder should be; through the script, whose exit code counts."""
    (tmp_path / "taken").write_text("")
    done = fork_script(
        "train.py", "--output_dir", str(tmp_path / "taken" / "output"), "--runs_dir", str(tmp_path / "runs")
    )
    assert done.returncode == 2 and "cannot be written" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("steps, said", [(2, True), (1, False)])
def test_a_warmup_longer_than_the_run_is_said(tmp_path, steps, said):
    places = ["--output_dir", str(tmp_path / "output"), "--runs_dir", str(tmp_path / "runs"), "--eval_data", "null"]
    done = fork_script("train.py", *places, "--max_steps", "2", "--warmup_steps", str(steps), "--save_steps", "0")
    note = f"note: warmup_steps {steps}: the run has 2 updates, lr is not reached"
    assert done.returncode == 0 and (note in done.stdout) == said


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The demo's base as models are published: its weights are bf16 numbers."""
    folder = shutil.copytree(PROJECT / "demo" / "base", tmp_path_factory.mktemp("published") / "base")
    weights = {name: tensor.bfloat16().float() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


ROUNDING = {  # settings that differ from bf16 with a low rate -> whether a note says that updates are rounded away
    "as it is": ([], True),
    "fp32": (["--dtype", "fp32"], False),
    "a higher rate": (["--lr", "1e-3"], False),
    "lora": (["--lora_r", "2"], False),
}


@pytest.mark.parametrize("case", ROUNDING.values(), ids=ROUNDING)
def test_updates_that_bf16_rounds_away_are_said(published, tmp_path, case):
    changed, said = case
    settings = ["--output_dir", str(tmp_path / "output"), "--runs_dir", str(tmp_path / "runs"), "--eval_data", "null"]
    settings += ["--config", "configs/demo.yaml", "--max_steps", "1", "--save_steps", "0", "--model", str(published)]
    settings += ["--dtype", "bf16", "--lr", "1e-7"]
    done = fork_script("train.py", *settings, *changed)
    assert done.returncode == 0 and ("note: dtype bf16 rounds changes below " in done.stdout) == said, done.stdout


def test_a_reward_that_always_fails_stops_the_run(model, tmp_path):
    """On two ranks: both stop, rank 0 names the function, exit.json says 2."""
    (tmp_path / "mine.py").write_text("def broken_reward(completions, **columns):\n    return [1 / 0]\n")
    done = fork_script(
        "train.py",
        "--output_dir",
        str(tmp_path / "output"),
        "--runs_dir",
        str(tmp_path / "runs"),
        "--rewards",
        json.dumps({f"{tmp_path}/mine.py:broken_reward": 1.0}),
        "--eval_data",
        "null",
        nproc=2,
    )
    assert done.returncode != 0
    assert "broken_reward failed: ZeroDivisionError" in done.stderr and "64 of 64 completions" in done.stderr
    assert json.loads((tmp_path / "output" / "exit.json").read_text())["code"] == 2
