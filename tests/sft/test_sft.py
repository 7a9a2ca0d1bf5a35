"""The supervised stage without processes: packed rows, texts to learn, the `sft:` section and its command line."""

import dataclasses

import numpy as np
import pytest
import torch
import yaml

from grpo.config.command_line import load_config, load_sft_config
from grpo.config.documentation import markdown_rows
from grpo.config.settings import Config
from grpo.config.sft_section import OF_ROLLOUTS, SftSettings, own_settings, stage_config, stage_values
from grpo.data.questions import Questions, load_questions
from grpo.data.recipe import make_recipe
from grpo.errors import UserError
from grpo.models.loading import load_tokenizer
from grpo.runtime.distributed import World
from grpo.sft.packing import check_packing, collate_packs, pack
from grpo.sft.policy import SftPolicy, sft_batches
from grpo.sft.texts import TOO_LONG, load_texts, solution_of, solutions_sha256
from grpo.training.metrics import Tally
from grpo.types import Prompt, TrainRow
from tests.support.launcher import PROJECT
from tests.support.tiny import ARCHITECTURES, tiny_model, tiny_tokenizer

ALONE = World(0, 1, 0, 1, torch.device("cpu"))
CPU = torch.device("cpu")
VOCAB = 300


def config(**own):
    """A Config of the supervised stage; rows of up to 48 tokens."""
    shared = {"model": "m", "data": "d", "max_prompt_length": 24, "max_generate_length": 24, "batch_size": 8}
    names = {name: own.pop(name) for name in list(own) if name in vars(Config())}
    return stage_config(stage_values(vars(Config()) | shared, {"solution_column": "answer", **names, **own}))


def texts(count=9, seed=0):
    """Random texts: prompts of 1 to 20 tokens (beyond the Gemmas' window of 8), completions of 1 to 16."""
    rng = np.random.default_rng(seed)
    draw = lambda most: rng.integers(1, VOCAB, rng.integers(1, most + 1))  # noqa: E731
    return [
        TrainRow(n, tuple(draw(20).tolist()), ids.astype(np.int32), np.zeros(len(ids), np.float32), None, 0.0)
        for n, ids in enumerate(draw(16) for _ in range(count))
    ]


# --- packing


def test_rows_are_filled_and_nothing_is_lost():
    lengths = np.random.default_rng(0).integers(1, 40, 200).tolist()
    rows = pack(lengths, 40)
    assert sorted(n for row in rows for n in row) == list(range(200))
    sizes = [sum(lengths[n] for n in row) for row in rows]
    assert max(sizes) <= 40 and sum(lengths) / (40 * len(rows)) > 0.9, "rows are left half empty"
    assert pack([50, 3], 40) == [(0,), (1,)]


def gradient_of(policy, batches):
    """Loss, token accuracy and gradient of a step."""
    policy.model.zero_grad()
    tally = Tally()
    loss = sum(policy.loss(micro, tally, True) for micro in batches)
    loss.backward()
    tally.settle()
    hits = tally.sums["sft/token_accuracy"] / tally.counts["sft/token_accuracy"]
    gradient = torch.cat([p.grad.flatten().double() for p in policy.model.parameters() if p.grad is not None])
    return float(loss.detach()), hits, gradient


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_packed_equals_unpacked_in_loss_and_gradient(architecture):
    """To 1e-6; without positions that start again (the control) texts see each other, and the loss is off by 1e-3."""
    rows = texts()
    packed, unpacked = config(packing=True), config()
    policy = SftPolicy(packed, ALONE, tiny_model(architecture, VOCAB, spread=2.0))
    together = sft_batches(packed, ALONE, rows)
    assert sum(len(micro.rows) for micro in together) < len(rows), "nothing was packed"
    loss, hits, gradient = gradient_of(policy, together)
    one_by_one = sft_batches(dataclasses.replace(unpacked, micro_batch_tokens=1), ALONE, rows)
    assert len(one_by_one) == len(rows) and all(micro.position_ids is None for micro in one_by_one)
    expected, expected_hits, wanted = gradient_of(policy, one_by_one)
    assert loss == pytest.approx(expected, rel=1e-6) and hits == pytest.approx(expected_hits, abs=1e-9)
    assert float((gradient - wanted).norm() / wanted.norm()) <= 1e-6
    mixed = [dataclasses.replace(micro, position_ids=None) for micro in together]
    off, _, _ = gradient_of(policy, mixed)
    assert abs(off - expected) > 1e-3


def test_the_loss_is_the_mean_over_tokens_of_the_models_own():
    """Against transformers' labels, text by text; so is the share of tokens that are the likeliest."""
    rows = texts(4)
    policy = SftPolicy(config(), ALONE, tiny_model("llama", VOCAB, spread=2.0))
    loss, hits, _ = gradient_of(policy, sft_batches(policy.cfg, ALONE, rows))
    lost, right, tokens = 0.0, 0, 0
    for row in rows:
        ids = torch.tensor([[*row.prompt_ids, *row.token_ids.tolist()]])
        labels = ids.clone()
        labels[0, : len(row.prompt_ids)] = -100
        out = policy.model(input_ids=ids, labels=labels)
        count = len(row.token_ids)
        lost, tokens = lost + float(out.loss.detach()) * count, tokens + count
        right += int((out.logits[0, -count - 1 : -1].argmax(-1) == ids[0, -count:]).sum())
    assert loss == pytest.approx(lost / tokens, rel=1e-5) and hits == pytest.approx(right / tokens, abs=1e-6)
    measured = policy.measure(rows)
    assert measured == pytest.approx({"eval/loss": loss, "eval/token_accuracy": hits}, rel=1e-5)


def test_no_text_predicts_the_first_token_of_the_next():
    rows = texts(3)
    micro = collate_packs([0], [rows], 0.5, CPU)
    targets = np.concatenate([row.token_ids for row in rows])
    assert micro.target_ids[0].tolist() == targets.tolist() and bool(micro.trained.all())
    before = [[*row.prompt_ids, *row.token_ids[:-1].tolist()] for row in rows]
    assert micro.input_ids[0].tolist() == [token for ids in before for token in ids]
    assert micro.position_ids[0].tolist() == [place for ids in before for place in range(len(ids))]
    last_of_prompt = micro.positions[0, [0, len(rows[0].token_ids)]].tolist()
    assert last_of_prompt == [len(rows[0].prompt_ids) - 1, len(before[0]) + len(rows[1].prompt_ids) - 1]


def test_a_model_that_mixes_packed_texts_is_refused():
    model = tiny_model("qwen3", VOCAB)
    check_packing(model)
    plain = type(model.base_model).forward
    blind = lambda *args, position_ids=None, **kwargs: plain(model.base_model, *args, **kwargs)  # noqa: E731
    model.base_model.forward = blind
    with pytest.raises(UserError, match=r"see each other.*Set packing: false"):
        SftPolicy(config(packing=True), ALONE, model)
    SftPolicy(config(), ALONE, model)  # unpacked, it may be taught


# --- what is learned


CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def texts_of(cfg, tokenizer, items, stop_ids=frozenset({0, 1})):
    recipe = make_recipe(cfg, tokenizer)
    from grpo.data.recipe import build, encode, render

    prompts = []
    for row, columns in enumerate(items):
        messages = build(recipe, columns["question"], columns)
        text = render(recipe, messages, tokenizer)
        ids = tuple(encode(recipe, text, tokenizer))
        prompts.append(Prompt(row, text, ids, columns, messages, columns["answer"]))
    return load_texts(cfg, recipe, tokenizer, Questions(prompts, 0), stop_ids)


def test_a_plain_solution_ends_with_eos():
    tokenizer = tiny_tokenizer()
    found = texts_of(config(prompt_template="{question}\n"), tokenizer, [{"question": "7?", "answer": "#### 10"}])
    [row] = found.all()
    assert tokenizer.decode(list(row.prompt_ids)) == "7?\n"
    assert tokenizer.decode(row.token_ids.tolist()) == "#### 10<|endoftext|>"


def test_a_chat_template_ends_the_turn_and_what_stands_after_is_left_out():
    """The token that ends the turn is one that ends generation; the line break behind it is never generated."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT
    cfg = config(system_prompt="Be short.", max_prompt_length=96)
    item = {"question": "7?", "answer": "10"}
    [row] = texts_of(cfg, tokenizer, [item]).all()
    decoded = [tokenizer.decode(list(ids)) for ids in (row.prompt_ids, row.token_ids.tolist())]
    assert decoded == ["<system>Be short.<|im_end|>\n<user>7?<|im_end|>\n<assistant>", "10<|im_end|>"]
    whole = dataclasses.replace(texts_of(cfg, tokenizer, [item]), whole=True).all()[0]
    assert len(whole.prompt_ids) == 1
    assert [*whole.prompt_ids, *whole.token_ids] == [*row.prompt_ids, *row.token_ids]


def test_the_template_of_the_mathematics_task_opens_the_answer_only_once():
    """Its prompt already ends in <start_working_out>, with which the solution begins."""
    tokenizer = tiny_tokenizer()
    template = "<start_working_out>{generated_solution}<end_working_out><SOLUTION>{expected_answer}</SOLUTION>"
    cfg = config(
        chat_template_file="configs/working_out.jinja",
        system_prompt="S",
        solution_template=template,
        solution_remove=["<think>", "</think>"],
        strip_cells=True,
        max_generate_length=200,
    )
    item = {"question": "1+1?", "answer": "2", "expected_answer": "2", "generated_solution": "<think> so 2\n</think>"}
    [row] = texts_of(cfg, tokenizer, [item]).all()
    assert tokenizer.decode(list(row.prompt_ids)) == "S<|endoftext|>1+1?<start_working_out>"
    completion = tokenizer.decode(row.token_ids.tolist())
    assert completion == "so 2<end_working_out><SOLUTION>2</SOLUTION><|endoftext|>"


def test_a_template_that_changes_the_prompt_is_refused():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages | length }}" + CHAT
    with pytest.raises(UserError, match="does not begin with the prompt"):
        texts_of(config(), tokenizer, [{"question": "7?", "answer": "10"}])


def test_long_solutions_are_left_out_with_a_count():
    items = [{"question": "7?", "answer": "10"}, {"question": "8?", "answer": "10, " * 30}]
    found = texts_of(config(), tiny_tokenizer(), items)
    assert len(found.solutions) == 1 and found.questions.drops == {TOO_LONG: 1}
    with pytest.raises(UserError, match=r"every solution \(1\) is longer than max_generate_length 2"):
        texts_of(config(max_generate_length=2), tiny_tokenizer(), items[1:])


def test_solutions_come_from_the_cell_as_it_stands():
    """Rewards see the part of the answer behind ####, the solution is the whole; both are told apart on resume."""
    cfg = config(
        data=str(PROJECT / "demo" / "train.jsonl"),
        data_rows=3,
        answer_format="hash",
        chat_template=False,
        max_prompt_length=96,
    )
    tokenizer = load_tokenizer(str(PROJECT / "demo" / "base"))
    questions = load_questions(cfg, make_recipe(cfg, tokenizer), tokenizer)
    first = questions.items[0]
    assert first.reference.endswith(f"\n#### {first.columns['answer']}") and len(first.columns["answer"]) < 3
    assert solution_of(first, own_settings(cfg), cfg) == first.reference
    both = SftSettings(solution_column="answer", solution_template="{solution} | {answer}")
    assert solution_of(first, both, cfg) == f"{first.reference} | {first.columns['answer']}"
    other = [dataclasses.replace(item, reference=item.reference + " ") for item in questions.items]
    assert solutions_sha256(questions) != solutions_sha256(dataclasses.replace(questions, items=other))


@pytest.mark.parametrize(
    ("own", "columns", "match"),
    [
        ({"solution_column": "worked"}, {}, "solution_column: the data has no column 'worked'"),
        ({"solution_template": "{worked}"}, {}, "solution_template: the data has no column 'worked'"),
        ({"solution_template": "{a}"}, {"a": " "}, "question 1, column 'a': the cell is empty"),
        ({"solution_template": "{a}"}, {"a": None}, "question 1, column 'a': the cell is empty"),
        ({"solution_template": "{a}", "solution_remove": ["x"]}, {"a": "xx"}, "the cell is empty"),
    ],
)
def test_solutions_that_are_not_there_are_named(own, columns, match):
    with pytest.raises(UserError, match=match):
        solution_of(Prompt(0, "q", (1,), {"question": "q", **columns}), SftSettings(**own), Config())


# --- settings


def file_of(tmp_path, **section):
    file = tmp_path / "both.yaml"
    shared = {"model": "m", "data": "d", "rewards": {"mark_reward": 1.0}, "lr": 1e-6, "batch_size": 2, "beta": 0.1}
    file.write_text(yaml.safe_dump({**shared, "sft": {"solution_column": "answer", **section}}))
    return ["--config", str(file)]


def test_defaults_then_file_then_section_then_command_line(tmp_path):
    argv = file_of(tmp_path, lr=2e-4, epoch=7)
    cfg, _ = load_sft_config([*argv, "--epoch", "9", "--loss_on", "all"])
    assert (cfg.batch_size, cfg.lr, cfg.epoch) == (2, 2e-4, 9)
    assert own_settings(cfg) == SftSettings(solution_column="answer", loss_on="all")
    assert (cfg.output_dir, cfg.run_name, cfg.beta) == ("./output_sft", "both_sft", 0.0)
    grpo, _ = load_config(argv)
    assert (grpo.lr, grpo.epoch, grpo.beta, grpo.run_name, grpo.sft) == (1e-6, 3, 0.1, "both", {})
    cfg, _ = load_sft_config([*argv, "--output_dir", "here", "--run_name", "so"])
    assert (cfg.output_dir, cfg.run_name) == ("here", "so")


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"learning_rate": 1}, "sft: unknown setting 'learning_rate'"),
        ({"solution_colum": "a"}, "did you mean solution_column?"),
        ({"num_generations": 4}, "sft: num_generations has no effect there"),
        ({"lr": "fast"}, "sft: lr: must be a number, got 'fast'"),
        ({"lr": -1.0}, "sft: lr: must be a finite number > 0"),
        ({"loss_on": "prompt"}, "sft: loss_on: must be one of completion, all"),
        ({"packing": 1}, "sft: packing: must be true or false"),
        ({"solution_column": None}, "sft: solution_column: none given, nor a solution_template"),
        ({"sft": {}}, "sft: unknown setting 'sft'"),
    ],
)
def test_both_stages_refuse_a_wrong_section(tmp_path, section, message):
    argv = file_of(tmp_path, **section)
    for load in (load_config, load_sft_config):
        with pytest.raises(UserError) as caught:
            load(argv)
        text = str(caught.value)
        assert message.removeprefix("" if load is load_config else "sft: ") in text and "\n" not in text


@pytest.mark.parametrize("words", [["--num_generations", "4"], ["--temperature=1"], ["--no_such", "1"], ["--lr", "x"]])
def test_the_command_line_of_the_stage_refuses_what_it_does_not_use(tmp_path, words):
    with pytest.raises(UserError) as caught:
        load_sft_config([*file_of(tmp_path), *words])
    assert words[0].split("=")[0].strip("-") in str(caught.value) and caught.value.code == 2
    load_sft_config(file_of(tmp_path))


def test_help_and_the_resolved_settings_are_printed(tmp_path, capsys):
    for word in ("--help", "--print_config"):
        with pytest.raises(SystemExit) as ended:
            load_sft_config([*file_of(tmp_path, lr=2e-4), word])
        out = capsys.readouterr().out
        assert ended.value.code == 0 and "solution_template" in out and "num_generations" not in out
    assert yaml.safe_load(out)["lr"] == 2e-4 and "output_sft" in out


def test_what_only_rollouts_use_may_change_between_the_stages(tmp_path):
    file = file_of(tmp_path)
    before, _ = load_sft_config(file)
    path = tmp_path / "both.yaml"
    path.write_text(path.read_text().replace("beta: 0.1", "beta: 0.2\nnum_generations: 16\ntop_p: 0.5"))
    assert load_sft_config(file)[0] == before
    assert {*vars(Config())} >= OF_ROLLOUTS


def test_the_documents_hold_the_table_of_these_settings():
    assert "\n".join(markdown_rows(SftSettings)) in (PROJECT / "docs" / "sft_and_lora.md").read_text(encoding="utf-8")
