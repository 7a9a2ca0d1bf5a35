"""What a run keeps from its start: the date that its chat template prints, its end of a turn, its rules for prompts."""

import json
import shutil

import torch
import yaml

from grpo.checkpoints.manifest import write_manifest
from grpo.data.recipe import KEPT, load_recipe
from grpo.evaluate.ask import CheckpointModel
from tests.support.launcher import fork_script
from tests.support.tiny import tiny_model, tiny_tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DATED = "{{ strftime_now('%Y-%m-%dT%H:%M:%S') }}\n" + CHATML  # to the second: no two starts print the same
ALSO = "completions also end at <|im_end|>"


CALM = "{% if calm %}Calmly, {{ calm }} times.\n{% endif %}"


def started(folder, template, nproc, **more):
    """A run of one step on so many processes. Returns how to go on with it on one process."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    tiny_model("qwen2", len(tokenizer)).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    (folder / "rows.jsonl").write_text('{"question": "2+2?"}\n{"question": "3+3?"}\n')
    (folder / "rewards.py").write_text(
        "def varied(completions, **columns):\n    return [len(t) for t in completions]\n"
    )
    settings = {
        "model": str(folder / "base"),
        "data": str(folder / "rows.jsonl"),
        "answer_column": None,
        "rewards": {f"{folder}/rewards.py:varied": 1.0},
        "reward_workers": 0,
        "max_prompt_length": 100,
        "max_generate_length": 8,
        "device": "cpu",
        "report_to": "none",
        **more,
    }
    (folder / "task.yaml").write_text(yaml.safe_dump(settings))

    def train(steps, nproc=None):
        return fork_script("train.py", "--config", "task.yaml", "--max_steps", str(steps), nproc=nproc, cwd=folder)

    done = train(1, nproc)
    assert done.returncode == 0, done.stderr[-2000:]
    assert ALSO in done.stdout.splitlines()[0], "the first line says it"
    return train


def forget(folder):
    """Make a checkpoint one that an older version wrote: its recipe lacks what KEPT names."""
    file = folder / "trainer" / "recipe.json"
    recipe = json.loads(file.read_text())
    file.write_text(json.dumps({name: value for name, value in recipe.items() if name not in KEPT}))
    (folder / "MANIFEST.json").unlink()
    write_manifest(folder, 1)


def test_the_date_of_the_start_is_kept_by_ranks_resume_and_inference(tmp_path):
    """Two processes agree, and a resume has the same questions; the control, without the kept date, has others.

    So are the variables of the chat template.
    """
    train = started(tmp_path, DATED + CALM, 2, chat_template_kwargs={"calm": 3})
    first = load_recipe(tmp_path / "output" / "checkpoint_1" / "trainer" / "recipe.json")
    shutil.copytree(tmp_path / "output", tmp_path / "kept")
    done = train(2)
    assert done.returncode == 0 and "resuming from" in done.stdout, done.stderr[-2000:]
    folder = tmp_path / "output" / "checkpoint_2"
    assert load_recipe(folder / "trainer" / "recipe.json") == first and first.date is not None
    model = CheckpointModel(folder, torch.device("cpu"), {"temperature": 0.0})
    text = model.text_of("2+2?", {})
    assert text.startswith(f"{first.date}\n<|im_start|>user\n2+2?") and text.endswith("Calmly, 3 times.\n")
    assert model.engine.stop_ids.tolist() == [0, 1]
    shutil.rmtree(tmp_path / "output")
    (tmp_path / "kept").rename(tmp_path / "output")
    forget(tmp_path / "output" / "checkpoint_1")
    refused = train(2)
    assert refused.returncode == 2 and "data has changed" in refused.stderr


def test_an_older_run_keeps_its_stop_tokens_and_rules(tmp_path):
    train = started(tmp_path, CHATML, None)
    forget(tmp_path / "output" / "checkpoint_1")
    done = train(2)
    assert done.returncode == 0 and "resuming from" in done.stdout, done.stderr[-2000:]
    assert ALSO not in done.stdout
    recipe = load_recipe(tmp_path / "output" / "checkpoint_2" / "trainer" / "recipe.json")
    assert (recipe.date, recipe.end_of_turn, recipe.rules) == (None, None, 1)
