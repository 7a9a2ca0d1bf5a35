"""The chat template of --for_serving gives a server the prompts of training; vLLM serves an export with our answers."""

import dataclasses
import json
import os
import re
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from tokenizers import processors
from transformers import AutoTokenizer

from grpo.checkpoints.manifest import write_manifest
from grpo.config.command_line import load_config
from grpo.data.recipe import Recipe, build, encode, make_recipe, recipe_text, render
from grpo.errors import UserError
from grpo.evaluate.ask import CheckpointModel
from grpo.export import serving_template
from grpo.export.command import main
from grpo.models.loading import load_tokenizer
from grpo.types import Counters
from inference import main as ask
from tests.support.launcher import PROJECT
from tests.support.tiny import tiny_tokenizer

CPU = torch.device("cpu")
OWN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}{% if thinking is defined %} {{ thinking }}{% endif %}"
    "{{ m.content }}<|im_end|>{% endfor %}{{ strftime_now('%d %b %Y') }}{% if add_generation_prompt %}>{% endif %}"
)
EXAMPLE = {"example_question": 'What\'s "1+1"?\n', "example_answer": "{{ 2 }}"}
RECIPES = {
    "plain": Recipe(prompt_template="{question}\n"),
    "plain, with everything": Recipe("Be {brief}.\\n", "Q: {question}\n{x} {question}?\n", strip_cells=True, **EXAMPLE),
    "plain, system to user": Recipe("Sys", "{question}", system_role="user", **EXAMPLE),
    "chat": Recipe(chat=True, date="2026-11-27T09:30:00"),
    "chat, with everything": Recipe(
        "你好 {% x %}", "{question} #}", True, True, **EXAMPLE, chat_template_kwargs={"thinking": [None, False, "é\n"]}
    ),
    "chat, system to user": Recipe("Sys", chat=True, system_role="user"),
}
QUESTIONS = ("2+2?", "  spaces \n", "{question} {{ q }} \\n 'a' \"b\"", "多少？\r\n")


def tokenizer_for(recipe: Recipe, bos: bool = False):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        OWN if recipe.date or not recipe.chat else OWN.replace("{{ strftime_now('%d %b %Y') }}", "")
    )
    if bos:
        start = ("<|im_end|>", tokenizer.convert_tokens_to_ids("<|im_end|>"))
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<|im_end|> $A", special_tokens=[start]
        )
    return tokenizer


def as_a_server(tokenizer, template: str, messages: list[dict[str, str]], **variables) -> list[int]:
    done = tokenizer.apply_chat_template(
        messages, chat_template=template, add_generation_prompt=True, tokenize=True, return_dict=True, **variables
    )
    return done["input_ids"]


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("bos", [False, True])
def test_a_question_becomes_the_prompt_of_training(name, bos):
    recipe = RECIPES[name]
    tokenizer = tokenizer_for(recipe, bos)
    template = serving_template.serving_template(recipe, tokenizer)
    for question in QUESTIONS:
        wanted = encode(recipe, render(recipe, build(recipe, question, {}), tokenizer), tokenizer)
        assert as_a_server(tokenizer, template, [{"role": "user", "content": question}]) == wanted
    # several turns are kept as they are, and so is a system message of the client
    turns = [{"role": r, "content": c} for r, c in (("system", "C"), ("user", "a"), ("assistant", "b"), ("user", "c"))]
    for given in (turns, turns[1:]):
        wanted = encode(recipe, render(recipe, build(recipe, given, {}), tokenizer), tokenizer)
        assert as_a_server(tokenizer, template, given) == wanted


def test_the_model_s_own_template_is_not_enough():
    """The control: without the preparations the prompts differ, and the function that makes the template says so."""
    recipe = RECIPES["chat, with everything"]
    tokenizer = tokenizer_for(recipe)
    wanted = encode(recipe, render(recipe, build(recipe, "2+2?", {}), tokenizer), tokenizer)
    assert as_a_server(tokenizer, tokenizer.chat_template, [{"role": "user", "content": "2+2?"}]) != wanted


def test_a_template_that_gives_other_prompts_is_refused(monkeypatch):
    monkeypatch.setattr(serving_template, "_preparations", lambda recipe: "")
    recipe = RECIPES["plain"]
    with pytest.raises(UserError, match="for_serving: no template gives this recipe's prompts: the question"):
        serving_template.serving_template(recipe, tokenizer_for(recipe))


def test_a_client_may_set_a_variable():
    recipe = RECIPES["chat, with everything"]
    tokenizer = tokenizer_for(recipe)
    template = serving_template.serving_template(recipe, tokenizer)
    ids = as_a_server(tokenizer, template, [{"role": "user", "content": "2+2?"}], thinking="CLIENT")
    assert " CLIENT" in tokenizer.decode(ids)


def test_a_date_in_a_computed_format_is_refused():
    recipe = RECIPES["chat"]
    tokenizer = tokenizer_for(recipe)
    tokenizer.chat_template = OWN.replace("'%d %b %Y'", "'%d' ~ '%b'")
    with pytest.raises(UserError, match="format that it computes"):
        serving_template.serving_template(recipe, tokenizer)


def demo_checkpoint(folder: Path, **recipe) -> Path:
    """The demo's base as a checkpoint of the demo, before its first step."""
    cfg, _ = load_config([])
    cfg = dataclasses.replace(cfg, prompt_template="{question}\n", **recipe)
    folder.mkdir()
    for path in (PROJECT / "demo" / "base").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "trainer").mkdir()
    state = {"counters": dataclasses.asdict(Counters(step=1)), "config": dataclasses.asdict(cfg)}
    (folder / "trainer" / "state.json").write_text(json.dumps(state))
    made = make_recipe(cfg, load_tokenizer(str(folder)))
    (folder / "trainer" / "recipe.json").write_text(recipe_text(made), encoding="utf-8")
    write_manifest(folder, 1)
    return folder


def test_an_export_for_servers_is_asked_with_the_same_prompt(tmp_path, capsys):
    checkpoint = demo_checkpoint(tmp_path / "checkpoint_1", system_prompt="End with <answer>.")
    out = tmp_path / "out"
    words = ["--checkpoint", str(checkpoint), "--to", "merged_16bit,gguf", "--for_serving", "--out", str(out)]
    assert main(words) == 0
    folder = out / "merged_16bit"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    own = CheckpointModel(checkpoint, CPU, {"temperature": 0.0})
    assert as_a_server(tokenizer, None, [{"role": "user", "content": "2+2?"}]) == list(own.encode("2+2?"))
    assert CheckpointModel(folder, CPU, {"temperature": 0.0}).encode("2+2?") == own.encode("2+2?")
    # a prompt without marks of turns: the server cuts the completion where the prompt ends
    answer = tokenizer("7 <think> 8<|endoftext|>")["input_ids"]
    assert tokenizer.parse_response(answer, prefix=own.text_of("2+2?", {}))["content"] == "7 <think> 8"
    fields = pytest.importorskip("gguf").GGUFReader(out / "gguf" / "model-f16.gguf").fields
    assert fields["tokenizer.chat_template"].contents() == tokenizer.chat_template
    # inference.py prints the same prompt from both, and splits answers by the same marks
    capsys.readouterr()
    shown = []
    for where in (checkpoint, folder):
        assert ask(["--checkpoint", str(where), "--show_prompt", "2+2?"]) == 0
        shown.append(capsys.readouterr())
    assert shown[0].out == shown[1].out == "End with <answer>.\n2+2?\n\n"
    assert f"prompt: {len(own.encode('2+2?'))} tokens" in shown[0].err
    assert ask(["--checkpoint", str(checkpoint), "--show_prompt"]) == 2


def test_for_serving_goes_with_an_export(tmp_path, capsys):
    assert main(["--for_serving", "--out", str(tmp_path), "--push", "a/b", "--dry_run"]) == 2
    assert "for_serving: goes with --checkpoint and --to" in capsys.readouterr().err


def test_request_and_answer_of_the_page_are_json():
    text = (PROJECT / "docs" / "serving.md").read_text(encoding="utf-8")
    [body] = re.findall(r"-d '(.*?)'\n", text, re.S)
    assert {"model", "messages", "temperature", "max_tokens", "logprobs", "top_logprobs"} == set(json.loads(body))
    [answer] = re.findall(r"^```json\n(.*?)^```$", text, re.M | re.S)
    assert json.loads(answer)["choices"][0]["logprobs"]["content"]


def post(port: int, key: str, **body):
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json", "Authorization": f"Bearer {key}"},
    )
    with urllib.request.urlopen(request, timeout=120) as reply:
        return json.load(reply)


PYTHON = PROJECT / ".venv-vllm" / "bin" / "python"


@pytest.mark.full
@pytest.mark.vllm
@pytest.mark.skipif(not PYTHON.exists(), reason="no vLLM here: bash launch/setup_vllm.sh")
@pytest.mark.timeout(900)
def test_vllm_answers_as_inference_does(tmp_path):
    """20 questions, greedily: chance gives none of them. The control is the export without --for_serving."""
    checkpoint = demo_checkpoint(tmp_path / "checkpoint_1")
    whole, plain = tmp_path / "for_serving", tmp_path / "plain"
    words = ["--checkpoint", str(checkpoint), "--to", "merged_16bit", "--out"]
    assert main([*words, str(whole), "--for_serving"]) == main([*words, str(plain)]) == 0
    own = CheckpointModel(whole, CPU, {"temperature": 0.0})
    questions = [json.loads(line)["question"] for line in (PROJECT / "demo" / "test.jsonl").open(encoding="utf-8")][:20]
    answers = [own.ask(own.encode(question)).text for question in questions]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", whole, "--served-model-name", "demo"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--api-key", "secret", "--dtype", "float32"]
    command += ["--enforce-eager", "--max-model-len", "176", "--trust-request-chat-template"]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "OMP_NUM_THREADS": "1"}
    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen(list(map(str, command)), stdout=log, stderr=log, env=environment)
    try:
        until = time.monotonic() + 600
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                assert server.poll() is None and time.monotonic() < until, (tmp_path / "log").read_text()[-2000:]
                time.sleep(1)
        control = (plain / "chat_template.jinja").read_text(encoding="utf-8")
        same = other = 0
        for question, answer in zip(questions, answers):
            body = {"model": "demo", "messages": [{"role": "user", "content": question}], "temperature": 0}
            reply = post(port, "secret", **body, max_tokens=80, logprobs=True, top_logprobs=2)["choices"][0]
            same += reply["message"]["content"] == answer
            assert all(
                token["logprob"] == token["top_logprobs"][0]["logprob"] for token in reply["logprobs"]["content"]
            )
            reply = post(port, "secret", **body, max_tokens=80, chat_template=control)["choices"][0]
            other += reply["message"]["content"] == answer
        assert same == len(questions) and other < len(questions) // 2, (same, other)
        with pytest.raises(urllib.error.HTTPError, match="401"):
            post(port, "wrong", **body)
    finally:
        server.terminate()
        server.wait(60)
