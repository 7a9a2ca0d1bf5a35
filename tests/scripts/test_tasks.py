"""The ready configurations, from data to score: small files in the columns of each task, tiny models, the real script.

What a perfect answer earns, and what a wrong one does, is asked of the configuration's own rewards on its own data.
"""

import csv
import dataclasses
import json
import re

import datasets
import pytest
import transformers

from grpo.config.command_line import load_config
from grpo.config.settings import Config
from grpo.data.questions import load_questions
from grpo.data.recipe import build, make_recipe, render
from grpo.rewards import RewardInput
from grpo.rewards.calls import Call
from grpo.rewards.pool import open_rewards
from tests.support.asking_rewards import answers_of
from tests.support.launcher import PROJECT, fork_script, metrics_of
from tests.support.tiers import sampled, short
from tests.support.tiny import tiny_config, tiny_tokenizer

ROWS = 6
THOUGHT = "先看題目，再逐一比較四個選項。" * 8  # more than 100 characters
CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>\n{% endif %}"
)
PERFECT = {  # a completion that earns all there is, {} being the gold answer
    "gsm8k_zh": ("<think>\n想\n</think>\n<answer>\n{}\n</answer>\n", 3.5),
    "gsm8k": ("<think>\na\nb\n</think>\n<answer>\n{}\n</answer>", 2.0),
    "gsm8k_reasoning": ("<reasoning>\na\n</reasoning>\n<answer>\n{}\n</answer>\n", 3.999),
    "dapo_math": ("a<end_working_out><SOLUTION>{}</SOLUTION>", 13.0),
    "multiple_choice": (f"<reasoning>{THOUGHT}</reasoning>\n<answer>{{}}</answer>", 1.0),
    "json_answers": ("{}", 1.0),
}


def save_rows(task, folder):
    """A file in the columns that the task comes in. Returns its path, or None where the configuration has its own."""
    sums = [(f"{n}+{n + 1}", 2 * n + 1) for n in range(1, ROWS + 1)]
    if task == "gsm8k_zh":
        rows = [{"question_zh-cn": f"{text}等于几？", "answer_only": str(gold)} for text, gold in sums]
        datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}).save_to_disk(str(folder / "data"))
        return folder / "data"
    if task in ("gsm8k", "gsm8k_reasoning"):
        rows = [{"question": f"{text}?", "answer": f"It is {gold}.\n#### {gold}"} for text, gold in sums]
        (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return folder / "data.jsonl"
    if task == "dapo_math":
        rows = [{"prompt": f"What is {text}?", "solution": str(gold)} for text, gold in sums]
        datasets.Dataset.from_list(rows).to_parquet(str(folder / "data.parquet"))
        return folder / "data.parquet"
    if task == "multiple_choice":
        with (folder / "data.csv").open("w", encoding="utf-8-sig", newline="") as file:
            writer = csv.writer(file)  # CRLF
            writer.writerow(["題目", *(f"選項{letter}" for letter in "ABCD"), "推理正確答案", "正確答案", "", ""])
            for n, (text, gold) in enumerate(sums):
                options = [gold + i - n % 4 for i in range(4)]
                writer.writerow([f" {text} 等於多少？", *options, THOUGHT, f"{'abcd'[n % 4]}. {gold}", "", ""])
        return folder / "data.csv"
    return None


def settings(task, folder, **changes):
    """The configuration as it is, on the small file, cut down to a few seconds."""
    data = save_rows(task, folder)
    small = {
        "max_steps": 2,
        "num_generations": 3,
        "batch_size": 2,
        "gradient_accumulation_steps": 1,
        "max_prompt_length": 1200,
        "max_generate_length": 12,
        "dtype": "fp32",
        "backend": "ddp",
        "lr": 1e-3,
        "device": "cpu",
        "model": folder / "model",
        "output_dir": folder / "output",
        "runs_dir": folder / "runs",
        "num_threads": 1,
        "load_in_4bit": False,
        "optimizer": "adamw",
    }
    if task in ("dapo_math", "multiple_choice"):  # all rewards are alike here, and an adapter that learned nothing
        small |= {"lora_r": 0, "sft": "{}"}  # is refused when it is saved
    cfg, _ = load_config(["--config", f"configs/{task}.yaml"])
    if data is not None:
        small["data"] = data
    if cfg.eval_data is not None:
        small.update(eval_data=data, eval_rows=2)
    elif cfg.eval_split_size:
        small["eval_split_size"] = 2
    flat = [word for name, value in {**small, **changes}.items() for word in (f"--{name}", str(value))]
    return ["--config", f"configs/{task}.yaml", *flat]


def tokenizer_with_chat():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT
    return tokenizer


def save_model(folder):
    """A tiny random model with room for long prompts, whose tokenizer has a chat template."""
    tokenizer = tokenizer_with_chat()
    config = tiny_config("qwen3", len(tokenizer))
    config.max_position_embeddings = 2048
    transformers.set_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """Of each task its settings, and the prompts of all rows."""
    found = {}
    for task in PERFECT:
        cfg, _ = load_config(settings(task, tmp_path_factory.mktemp(task), eval_split_size=0))
        tokenizer = tokenizer_with_chat()
        found[task] = cfg, load_questions(cfg, make_recipe(cfg, tokenizer), tokenizer).items
    return found


def total(cfg, prompt, *completions):
    """What the configuration's rewards give each completion of a prompt, weighted and summed."""
    rewards = open_rewards(dataclasses.replace(cfg, reward_workers=0), print)
    samples = [RewardInput(prompt.text, text, [1], prompt.columns) for text in completions]
    calls = [Call(k, (row,)) for k in range(len(rewards.rewards)) for row in range(len(samples))]
    sums = [0.0] * len(samples)
    for call, answer in zip(calls, answers_of(rewards, samples, calls), strict=True):
        [outcome] = answer.outcomes
        assert isinstance(outcome, float), outcome
        sums[call.rows[0]] += outcome * rewards.rewards[call.k].weight
    return sums


def test_every_ready_configuration_is_here():
    assert {path.stem for path in (PROJECT / "configs").glob("*.yaml")} == {*PERFECT, "demo", "smollm2"}


@pytest.mark.parametrize("task", PERFECT)
def test_a_perfect_answer_earns_all_and_a_wrong_one_less(task, asked):
    cfg, items = asked[task]
    best, most = PERFECT[task]
    golds = [item.columns["answer"] for item in items]
    wrong = next(gold for gold in golds if gold != golds[0])
    right, other, none = total(cfg, items[0], best.format(golds[0]), best.format(wrong), "I do not know.")
    assert right == pytest.approx(most)
    assert right > other and other >= none and none < 0.2 * most


def test_refusing_earns_less_than_right_and_more_than_wrong(asked):
    cfg, items = asked["multiple_choice"]
    answer = PERFECT["multiple_choice"][0]
    gold = items[0].columns["answer"]
    wrong = "ABCD"[("ABCD".index(gold) + 1) % 4]
    assert total(cfg, items[0], *(answer.format(x) for x in (gold, "?", wrong, ""))) == [1.0, 0.4, 0.0, 0.0]
    assert total(cfg, items[0], f"<answer>{gold}</answer>", "<answer>?</answer>") == [0.0, 0.0], "without reasons"


# --- exactly what the model reads


def test_the_prompt_of_each_task(asked):
    """By position, against text written out here."""
    first = {task: items[0].text for task, (_, items) in asked.items()}
    zh = "\n按照如下格式回答问题：\n<think>\n你的思考过程\n</think>\n<answer>\n你的回答\n</answer>\n"
    assert first["gsm8k_zh"] == f"<system>{zh}</system>\n<user>1+2等于几？</user>\n<assistant>\n"
    reasoning = "Respond in the following format:\n<reasoning>\n...\n</reasoning>\n<answer>\n...\n</answer>\n"
    assert first["gsm8k_reasoning"] == f"<system>{reasoning}</system>\n<user>1+2?</user>\n<assistant>\n"
    assert first["gsm8k"].endswith("\n</answer>\n</system>\n<user>1+2?</user>\n<assistant>\n")
    assert first["multiple_choice"] == (
        "請閱讀以下選擇題，並輸出解題步驟與正確答案（使用指定格式）：\n1+2 等於多少？\nA. 3\nB. 4\nC. 5\nD. 6\n"
        "請依照以下格式輸出：\n<reasoning>...</reasoning>\n<answer>...</answer>\n"
        "若無法確定答案，請不要猜測：推理照寫，答案改為 <answer>?</answer>。\n"
    )
    assert first["dapo_math"] == SYSTEM + "<|endoftext|>" + "What is 1+2?" + "<start_working_out>"


SYSTEM = (
    "You are given a problem.\nThink about the problem and provide your working out.\n"
    "Place it between <start_working_out> and <end_working_out>.\n"
    "Then, provide your solution between <SOLUTION></SOLUTION>"
)
ANSWER = "<start_working_out>I think it's 2.<end_working_out><SOLUTION>2</SOLUTION>"
DIALOGUE = [
    {"role": "user", "content": "What is 1+1?"},
    {"role": "assistant", "content": ANSWER},
    {"role": "user", "content": "What is 2+2?"},
]


@pytest.mark.parametrize("system", [None, 'It\'s "so", {{ 1 }} {% x %}\n\\'])
def test_the_chat_template_of_the_mathematics_task(system):
    """Each part at its place; a system text with quotes and braces stays as it is, none gives the usual one."""
    tokenizer = tiny_tokenizer()
    recipe = make_recipe(Config(chat_template_file="configs/working_out.jinja", system_prompt=system), tokenizer)
    eos = "<|endoftext|>"
    parts = [SYSTEM if system is None else system, eos, "What is 1+1?", ANSWER, eos, "What is 2+2?"]
    assert render(recipe, build(recipe, DIALOGUE, {}), tokenizer) == "".join([*parts, "<start_working_out>"])
    assert tokenizer.apply_chat_template(build(recipe, DIALOGUE, {}), tokenize=False) == "".join(parts)


# --- end to end


LOOP = """
import json, os, sys
import train
from grpo.config.command_line import load_config
from grpo.run.main import run_main
for folder, argv in json.loads(sys.argv[1]):
    os.chdir(folder)
    code = run_main(train.train, load_config, argv)
    if code:
        sys.exit(code)
"""
ALONE = [task for task in PERFECT if task != "gsm8k_zh"]


def page_files():
    """The files of the task in 15 lines that docs/task.md shows whole."""
    text = (PROJECT / "docs" / "task.md").read_text(encoding="utf-8")
    return dict(re.findall(r"`(my_words\.\w+)`:\n\n```\w+\n(.*?)^```$", text, re.M | re.S))


SHORT = ["gsm8k_zh", "dapo_math", *sampled([task for task in ALONE if task != "dapo_math"], seed=1)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, request):
    """Tasks trained for two steps: one on two processes, the others, and the page's, in turn in one process."""
    tasks = PERFECT if request.config.getoption("--full") else SHORT
    folders = {task: tmp_path_factory.mktemp(task) for task in [*PERFECT, "page"]}
    save_model(folders["gsm8k_zh"] / "model")
    for task in ALONE:
        (folders[task] / "model").symlink_to(folders["gsm8k_zh"] / "model")
    runs = [(str(PROJECT), settings(task, folders[task])) for task in ALONE if task in tasks]
    for name, content in page_files().items():
        (folders["page"] / name).write_text(content, encoding="utf-8")
    page = ["--model", str(folders["gsm8k_zh"] / "model"), "--max_steps", "1", "--max_generate_length", "8"]
    runs.append((str(folders["page"]), ["--config", "my_words.yaml", *page]))
    loop = folders["page"] / "loop.py"
    loop.write_text(LOOP)
    alone = fork_script(str(loop), json.dumps(runs))
    assert alone.returncode == 0, alone.stdout[-2000:] + alone.stderr[-3000:]
    two = fork_script("train.py", *settings("gsm8k_zh", folders["gsm8k_zh"]), nproc=2)
    assert two.returncode == 0, two.stdout[-2000:] + two.stderr[-3000:]
    return folders


@pytest.mark.parametrize("task", short(PERFECT, SHORT))
def test_each_task_trains_evaluates_and_saves(trained, task):
    """Two steps; every reward of the configuration is on the curves, and so is the evaluation, before and after."""
    folder = trained[task]
    cfg, _ = load_config(settings(task, folder))
    rows = metrics_of(folder / "runs")
    steps = [row for row in rows if "loss" in row]
    assert len(steps) == 2 and all(f"reward/{name}/mean" in row for row in steps for name in cfg.rewards)
    assert all(row["reward/failures"] == 0 for row in steps)
    evaluated = [row for row in rows if any(name.startswith("eval/") for name in row)]
    assert [row["step"] for row in evaluated] == [0, 2]
    checkpoint = folder / "output" / "checkpoint_2"
    assert (checkpoint / "MANIFEST.json").is_file()
    recipe = json.loads((checkpoint / "trainer" / "recipe.json").read_text())
    assert recipe["system_prompt"] == cfg.system_prompt and recipe["prompt_template"] == cfg.prompt_template


def test_a_checkpoint_keeps_the_chat_template_of_its_task(trained):
    """So that the question is put the same way later, with the file gone: by us, and by anyone who loads the folder."""
    from grpo.data.recipe import load_recipe
    from grpo.models.loading import load_tokenizer

    checkpoint = trained["dapo_math"] / "output" / "checkpoint_2"
    recipe, tokenizer = load_recipe(checkpoint / "trainer" / "recipe.json"), load_tokenizer(str(checkpoint))
    text = render(recipe, build(recipe, "What is 1+2?", {}), tokenizer)
    assert text == SYSTEM + "<|endoftext|>What is 1+2?<start_working_out>"
    assert tokenizer.chat_template == (PROJECT / "configs" / "working_out.jinja").read_text()


# --- the page


def test_your_own_task_takes_15_lines_and_trains(trained):
    """The page's files as they stand there, on a tiny model; no reward fails."""
    files = page_files()
    assert set(files) == {"my_words.jsonl", "my_words.py", "my_words.yaml"}
    assert sum(bool(line) for content in files.values() for line in content.splitlines()) == 15
    [step] = [row for row in metrics_of(trained["page"] / "runs") if "loss" in row]
    assert step["reward/failures"] == 0 and 0 < step["reward/short_reward/mean"] <= 1
    assert (trained["page"] / "output" / "my_words" / "checkpoint_1" / "MANIFEST.json").is_file()
