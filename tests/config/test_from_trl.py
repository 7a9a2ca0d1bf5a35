"""Options of TRL: every one has a line, unknown ones get the right hint, and recipes become settings that load.

The recipes beside this file have the keys of open-r1's five GRPO recipes and of TRL's example configurations, with
values of their own; NAME.ours.yaml is what each becomes. Batch sizes are computed by hand below.
"""

import dataclasses
import re
import typing
from pathlib import Path

import pytest
import yaml

from grpo.config import __main__ as command
from grpo.config import from_trl, trl_names, trl_rewards
from grpo.config.checks import check, has_type
from grpo.config.command_line import load_config, load_sft_config
from grpo.config.from_trl import as_yaml, convert
from grpo.config.settings import Config, TrackerName, prompts_per_step
from grpo.config.sft_section import OWN
from grpo.config.trl_names import ROWS, VALUES, value_hint
from grpo.config.trl_rewards import BY_NAME
from grpo.errors import UserError
from tests.support.launcher import PROJECT

RECIPES = Path(__file__).parent / "recipes"
BASE = ["--model", "m", "--data", "d", "--rewards", "{r: 1.0}"]
PROCESSES = 7
P = {  # prompts of a step, by hand: per device x processes x parts of a generation / completions of a prompt
    "open_r1_distill": 16 * 7 * 16 / 7,
    "open_r1_demo": 16 * 7 * 16 / 7,
    "open_r1_code": 16 * 7 * 4 / 14,
    "open_r1_codeforces": 8 * 7 * 16 / 16,
    "open_r1_simple_rl": 16 * 7 * 8 / 7,
    "trl_gspo": 8 * 7 * 8 / 8,
    "trl_lora_script": 1 * 7 * 2 / 2,
    "trl_nemo_gym": 1 * 7 * 256 / 16,
    "trl_cli": 8 * 7 * 1 / 8,
    "trl_defaults": 8 * 7 * 1 / 8,
}


def options(name):
    return yaml.safe_load((RECIPES / f"{name}.yaml").read_text())


def loadable(settings):
    """A Config of a recipe's settings; what recipes lack is given."""
    cfg = Config(**{"model": "m", "data": "d", "rewards": {"r": 1.0}} | settings)
    check(cfg)
    return cfg


# --- the table


def test_every_option_of_the_installed_trl_has_a_line():
    trl = pytest.importorskip("trl")
    kinds = (trl.GRPOConfig, trl.ModelConfig, trl.ScriptArguments, trl.SFTConfig)
    names = {field.name for kind in kinds for field in dataclasses.fields(kind)}
    assert len(names) > 200 and names - set(ROWS) == set()


def test_every_target_is_a_setting():
    targets = {name for row in ROWS.values() for name in row.here.split()}
    assert targets - {field.name for field in dataclasses.fields(Config)} - set(OWN) == set()
    assert len(targets) > 60


def test_every_value_of_theirs_has_one_of_ours():
    kinds = typing.get_type_hints(Config)
    for setting, values in VALUES.items():
        assert all(has_type(value, kinds[setting]) for value in values.values())


def test_a_reward_that_is_mapped_is_in_the_library():
    import reward_func

    ours = {reward.here for reward in BY_NAME.values() if reward.here}
    assert {name for name in ours if not hasattr(reward_func, name)} == set()


# --- hints


def line_of(load, argv):
    with pytest.raises(UserError) as caught:
        load(argv)
    assert caught.value.code == 2 and "\n" not in str(caught.value)
    return str(caught.value)


HINTS = {
    "learning_rate": "TRL's name, here it is lr",
    "max_completion_length": "TRL's name, here it is max_generate_length. 512 in TRL, 256 here",
    "per_device_train_batch_size": "TRL's name, here it is batch_size. Prompts of a step on all processes",
    "reward_funcs": "TRL's name, here it is rewards. One mapping",
    "num_train_epochs": "TRL's name, here it is epoch",
    "use_vllm": "TRL's name, here it is rollout_engine. Write vllm: docs/vllm.md",
    "dataloader_num_workers": "TRL's, there is none here. Prompts are tokenized at the start",
    "importance_sampling_level": "TRL's name, here it is ratio",
    "off_policy_mask_threshold": "TRL's name, here it is off_policy_threshold. TRL takes the old log-probs",
    "top_entropy_quantile": "TRL's name, here it is top_entropy_share. TRL's quantile is over a micro-batch",
    "model_name_or_path": "TRL's name, here it is model",
}


@pytest.mark.parametrize("name", HINTS)
def test_an_option_of_trl_is_named_on_the_command_line_and_in_files(tmp_path, name):
    assert f"unknown setting '--{name}': {HINTS[name]}" in line_of(load_config, [*BASE, f"--{name}", "1"])
    dashed = name.replace("_", "-")
    assert HINTS[name] in line_of(load_config, [*BASE, f"--{dashed}=1"])
    file = tmp_path / "c.yaml"
    file.write_text(f"model: m\n{name}: 1\n")
    text = line_of(load_config, ["--config", str(file)])
    assert f"line 2: unknown setting '{name}': {HINTS[name]}" in text
    assert text.endswith("Convert a recipe: python -m grpo.config --from_trl FILE")


def test_the_supervised_stage_gets_them_too(tmp_path):
    file = tmp_path / "c.yaml"
    for name, said in (
        ("learning_rate", "sft: unknown setting 'learning_rate': TRL's name, here it is lr"),
        ("completion_only_loss", "sft: unknown setting 'completion_only_loss': TRL's name, here it is loss_on"),
        ("attn_implementation", "sft: unknown setting 'attn_implementation': TRL's, there is none here"),
        ("loss_type", "sft: loss_type has no effect there: no completions are sampled. Leave it out."),
    ):
        file.write_text(f"model: m\ndata: d\nrewards: {{r: 1.0}}\nsft:\n  solution_column: s\n  {name}: 1\n")
        assert line_of(load_config, ["--config", str(file)]).startswith(said)
    text = line_of(load_sft_config, ["--model", "m", "--data", "d", "--max_length", "5"])
    assert "unknown setting '--max_length': TRL's name, here it is max_generate_length" in text


@pytest.mark.parametrize(
    "argv, end",
    [
        (["--dtype", "bfloat16"], "dtype: must be one of fp32, bf16, got 'bfloat16'. Write bf16"),
        (["--optimizer", "adamw_torch"], "got 'adamw_torch'. Write adamw"),
        (["--chat_template", "{{ x }}"], "The text of a template goes into a file: chat_template_file"),
        (["--eval_steps", "null"], "eval_steps: must be a whole number, got 'null'. Leave it out for the default"),
        (["--lora_target_modules", "null"], "got 'null'. Leave it out for the default"),
        (["--weighting", "bnpo"], "weighting: must be one of grpo, dapo, dr_grpo, got 'bnpo' (see"),
    ],
)
def test_values_of_trl(argv, end):
    assert end in line_of(load_config, [*BASE, *argv])


def test_what_is_no_option_of_trl_gets_no_such_hint():
    assert "did you mean --lr?" in line_of(load_config, [*BASE, "--lrr", "1"])
    assert "TRL" not in line_of(load_config, [*BASE, "--foo", "1"])
    assert value_hint("dtype", "int8") == ""


# --- recipes


@pytest.mark.parametrize("name", P)
def test_each_recipe_becomes_what_is_kept_beside_it_and_loads(name):
    recipe = convert(options(name), PROCESSES)
    text = as_yaml(recipe, f"{name}.yaml")
    kept = (RECIPES / f"{name}.ours.yaml").read_text()
    assert [x for x in text.split("\n") if x[:1] == "#"] == [x for x in kept.split("\n") if x[:1] == "#"]
    assert yaml.safe_load(text) == yaml.safe_load(kept) == recipe.settings
    assert prompts_per_step(loadable(recipe.settings)) == P[name]


def test_the_recipes_are_all_there():
    assert {path.stem for path in RECIPES.glob("*.yaml") if not path.stem.endswith(".ours")} == set(P)


def test_the_command(tmp_path, capsys):
    """Its output is a file that train.py reads."""
    file = str(RECIPES / "trl_defaults.yaml")
    assert command.main(["--from_trl", file, "--processes", "2", "--rows", "100"]) == 0
    written = tmp_path / "ours.yaml"
    written.write_text(capsys.readouterr().out)
    cfg, _ = load_config(["--config", str(written)])
    assert (cfg.batch_size, cfg.max_steps, cfg.weighting, cfg.dtype) == (2, 150, "dapo", "bf16")
    for argv, said in (
        (["--from_trl", file], "error: processes: must be the number of training processes"),
        (["--from_trl", file, "--processes", "0"], "error: processes: "),
        (["--from_trl", file, "--processes", "8", "--rows", "7"], "error: rows: TRL needs at least one full step of 8"),
        (["--from_trl", str(tmp_path / "no.yaml"), "--processes", "8"], "error: config: "),
        (["--processes", "8"], "error: processes, rows: they belong to --from_trl RECIPE."),
    ):
        assert command.main(argv) == 2
        err = capsys.readouterr().err
        assert err.startswith(said) and err.count("\n") == 1


def test_processes_of_the_recipe_itself(capsys):
    """open-r1 writes num_processes beside the rest."""
    assert command.main(["--from_trl", str(RECIPES / "open_r1_demo.yaml")]) == 0
    assert "\nbatch_size: 256\n" in capsys.readouterr().out


def settings_of(processes=2, rows=None, **given):
    return convert(given, processes, rows).settings


@pytest.mark.parametrize(
    "given, batch, minibatches",
    [
        ({}, 8 * 2 // 8, 1),
        ({"gradient_accumulation_steps": 4}, 8 * 2 * 4 // 8, 1),
        ({"gradient_accumulation_steps": 2, "steps_per_generation": 8}, 8 * 2 * 8 // 8, 4),
        ({"generation_batch_size": 64}, 8, 4),
        ({"gradient_accumulation_steps": 4, "steps_per_generation": 2}, 8 * 2 * 4 // 8, 1),
        ({"per_device_train_batch_size": 3, "num_generations": 6}, 1, 1),
    ],
)
def test_batch_sizes_are_those_of_the_installed_trl(given, batch, minibatches):
    """By hand, and by what TRL computes of the same options for one process."""
    settings = settings_of(**given)
    assert (settings["batch_size"], settings.get("num_minibatches", 1)) == (batch, minibatches)
    trl = pytest.importorskip("trl")
    if "generation_batch_size" in given or given.get("per_device_train_batch_size"):
        return
    theirs = trl.GRPOConfig(**given, output_dir="x", use_cpu=True, bf16=False)
    prompts = theirs.generation_batch_size / theirs.num_generations
    alone = settings_of(1, **given)
    updates = theirs.steps_per_generation / theirs.gradient_accumulation_steps
    assert alone["batch_size"] / alone.get("num_minibatches", 1) == prompts / updates


@pytest.mark.parametrize(
    "given, said",
    [
        ({"num_generations": 7}, "num_generations: 7 must divide"),
        ({"gradient_accumulation_steps": 4, "steps_per_generation": 6}, "steps_per_generation: 6 must be a multiple"),
        ({"gradient_accumulation_steps": 4, "steps_per_generation": 2, "num_iterations": 2}, "steps_per_generation: 2"),
        ({"generation_batch_size": 40}, "generation_batch_size: must be a multiple of"),
        ({"generation_batch_size": 64, "steps_per_generation": 4}, "TRL takes one of them, got both"),
        ({"per_device_train_batch_size": 0}, "must be >= 1, got 0, 1, 8, 1."),
        ({"per_device_train_batch_size": 1.5}, "per_device_train_batch_size: must be a whole number, got 1.5"),
        ({"learning_rate": "fast"}, "learning_rate: must be a number, got 'fast'"),
        ({"use_peft": "maybe"}, "use_peft: must be true or false, got 'maybe'"),
        ({"lr_scheduler_kwargs": [1]}, "lr_scheduler_kwargs: must be a mapping, got [1]"),
        (
            {"reward_funcs": ["format"], "reward_weights": [1, 2]},
            "reward_weights: must be one number for each of the 1",
        ),
        ({"reward_funcs": ["format"], "reward_weights": ["x"]}, "reward_weights: must be one number"),
        ({"reward_funcs": 3}, "reward_weights: must be one number for each"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(given, said):
    text = line_of(lambda _: convert(given, 2), [])
    assert said in text


LATER = [pytest.param(value, marks=pytest.mark.full) for value in (True, 2.5, "", "x", {"a": 1}, float("nan"))]


@pytest.mark.parametrize("value", [-1, [1], "{a: [", *LATER], ids=repr)
def test_any_value_of_any_option_gives_settings_or_one_line(value):
    around = {"use_peft": True, "eval_strategy": "steps", "push_to_hub": True, "reward_funcs": ["cosine"]}
    outcomes = []
    for name in ROWS:
        try:
            text = as_yaml(convert({**around, name: value}, 2, 1000), "r.yaml")
            outcomes.append(isinstance(yaml.safe_load(text), dict))
        except UserError as error:
            outcomes.append("\n" not in str(error) and name in str(error))
    assert all(outcomes)


def test_steps_are_counted_in_samplings_not_in_updates():
    one = settings_of(max_steps=100, save_steps=30, eval_strategy="steps", eval_steps=10, dataset_name="d")
    four = settings_of(
        max_steps=100, save_steps=30, eval_strategy="steps", eval_steps=10, dataset_name="d", steps_per_generation=2,
        num_iterations=2,
    )  # fmt: skip
    assert (one["max_steps"], one["save_steps"], one["eval_steps"]) == (100, 30, 10)
    assert (four["max_steps"], four["save_steps"], four["eval_steps"]) == (25, 8, 3)
    share = settings_of(max_steps=200, save_steps=0.05)
    assert share["save_steps"] == 10
    epochs = settings_of(rows=101, num_train_epochs=2, save_strategy="epoch", gradient_accumulation_steps=5)
    assert (epochs["batch_size"], epochs["max_steps"], epochs["save_steps"]) == (10, 20, 10)
    older = settings_of(evaluation_strategy="epoch", dataset_name="d", rows=20)
    assert (older["eval_data"], older["eval_split"], older["eval_steps"]) == ("d", "test", 10)
    unknown = convert({"num_train_epochs": 0.5, "save_strategy": "epoch"}, 2)
    assert unknown.settings["epoch"] == 1 and "save_steps" not in unknown.settings
    assert [line.split(":")[0] for line in unknown.lost] == ["num_train_epochs", "save_strategy"]
    assert settings_of(save_strategy=False)["save_steps"] == 0  # YAML reads no as false


def test_the_mask_of_rows_far_from_the_sampler():
    assert settings_of(off_policy_mask_threshold=0.5)["off_policy_threshold"] == 0.5
    assert "off_policy_threshold" not in settings_of()


def test_schedules():
    def schedule(**given):
        chosen = settings_of(learning_rate=2e-6, **given)
        return tuple(chosen.get(name) for name in ("lr_schedule", "warmup_ratio", "warmup_steps", "min_lr_ratio"))

    assert schedule() == ("linear", None, None, None)
    assert schedule(lr_scheduler_type="constant", warmup_ratio=0.1) == ("constant", None, None, None)
    assert schedule(lr_scheduler_type="constant_with_warmup", warmup_steps=5) == ("constant_with_warmup", None, 5, None)
    assert schedule(lr_scheduler_type="constant_with_warmup")[0] == "constant"
    given = {"lr_scheduler_type": "cosine_with_min_lr", "warmup_steps": 0.25}
    assert schedule(**given, lr_scheduler_kwargs={"min_lr_rate": 0.1}) == ("cosine_with_min_lr", 0.25, None, 0.1)
    assert schedule(**given, lr_scheduler_kwargs='{"min_lr": 5e-7}')[3] == pytest.approx(0.25)
    assert schedule(**given)[0] == "cosine"
    assert convert({"lr_scheduler_type": "polynomial"}, 2).lost[0].startswith("lr_scheduler_type: 'polynomial'.")


def test_adapters():
    plain = settings_of(use_peft=True)
    assert (plain["lora_r"], plain["lora_alpha"], plain["lora_target_modules"]) == (16, 32, ["q_proj", "v_proj"])
    assert "lora_dropout" not in plain
    assert settings_of(use_peft=True, use_rslora=True, lora_alpha=8)["lora_alpha"] == 8 * 4  # 8 / sqrt(16) = 32 / 16
    assert settings_of(use_peft=True, lora_target_modules="all-linear").get("lora_target_modules") == "all-linear"
    assert "lora_r" not in settings_of(lora_r=8)  # without use_peft TRL trains the whole model


def test_rewards():
    recipe = convert(
        {"reward_funcs": ["repetition_penalty", "cf_code", "a.b.own"], "reward_weights": [2, 1, 1],
         "repetition_max_penalty": -0.5, "repetition_n_grams": 4}, 2,
    )  # fmt: skip
    assert recipe.settings["rewards"] == {"repetition_reward": 1.0, "my_rewards.py:cf_code_reward": 1, "a/b.py:own": 1}
    assert recipe.settings["reward_parameters"] == {"repetition_reward": {"length": 4}}
    assert recipe.settings["answer_column"] is None  # none of them reads a gold answer
    assert [line for line in recipe.lost if line.startswith("reward_funcs: cf_code. It asks a judge")]
    assert convert({"reward_funcs": ["accuracy"]}, 2).settings["answer_column"] == "solution"
    both = convert({"reward_funcs": ["accuracy_reward", "reasoning_accuracy_reward"], "reward_weights": [1, 2]}, 2)
    assert both.settings["rewards"] == {"boxed_math_reward": 1, "boxed_math_reward@reasoning_accuracy_reward": 2}
    parameters = both.settings["reward_parameters"]
    assert parameters == {"boxed_math_reward@reasoning_accuracy_reward": {"after": "</think>"}}
    length = convert({"reward_funcs": ["cosine"], "cosine_max_len": 300}, 2).settings["reward_parameters"]
    assert length["cosine_length_reward"] == {
        "min_value_wrong": 0.0, "max_value_wrong": -0.5, "min_value_correct": 0.5, "max_value_correct": 1.0,
        "max_length": 300,
    }  # fmt: skip
    model = convert({"reward_model_name_or_path": "someone/judge"}, 2).settings
    assert model["rewards"] == {"model_reward": 1.0}
    assert model["reward_parameters"] == {"model_reward": {"folder": "someone/judge"}}


def test_what_is_not_carried_over_is_named_and_what_changes_nothing_is_not():
    unknown = {"foo": 1, "fp16": True, "optim": "lion_32bit", "report_to": "all"}
    assert {line.split(":")[0] for line in convert(unknown, 2).lost} == set(unknown)
    lowest = {"use_adaptive_entropy": True, "entropy_coef_min": 0.1}
    assert convert(lowest, 2).lost == ["entropy_coef_min: 0.1. The coefficient may fall to 0."]
    harmless = {
        "delta": None,
        "top_entropy_quantile": 1.0,
        "adam_epsilon": "1e-8",
        "importance_sampling_level": "token",
    }
    assert convert({**harmless, "use_bias_correction_kl": False, "repetition_penalty": 1}, 2).lost == []
    tracked = convert({"report_to": ["trackio"]}, 2).settings["report_to"]
    assert tracked == ("trackio" if "trackio" in typing.get_args(TrackerName) else "none")


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (
            {"loss_type": "cispo", "epsilon_high": 5.0},
            {"surrogate": "cispo", "weighting": "dapo", "clip_eps_high": 4.0},
        ),
        ({"loss_type": "sapo", "epsilon": 0.1}, {"surrogate": "sapo", "weighting": "grpo", "clip_eps": None}),
        ({"importance_sampling_level": "sequence", "epsilon": 3e-4}, {"ratio": "sequence", "clip_eps": 3e-4}),
        ({"loss_type": "dapo"}, {"weighting": "dapo", "algorithm": None, "filter_groups": None}),  # theirs: no sampling
        ({"delta": 4.0}, {"clip_ratio_max": 4.0}),
        ({"beta": 0.1}, {"kl_estimator": "k3_weighted"}),
        ({"beta": 0.1, "use_bias_correction_kl": False}, {"kl_estimator": None}),
        ({"scale_rewards": "batch"}, {"scale_rewards": "batch"}),
        (
            {"multi_objective_aggregation": "normalize_then_sum"},
            {"normalize_each_reward": True, "baseline": "batch", "scale_rewards": "batch"},
        ),
        ({"mask_truncated_completions": True}, {"truncated": "mask"}),
        ({"top_entropy_quantile": 0.2, "entropy_coef": 0.01}, {"top_entropy_share": 0.2, "entropy_coef": 0.01}),
        (
            {"use_adaptive_entropy": True, "entropy_coef_delta": 0.01, "entropy_coef_max": 0.5},
            {"entropy_target": 0.2, "entropy_coef_step": 0.01, "entropy_coef_max": 0.5},
        ),
        ({"entropy_target": 0.3, "entropy_coef_min": 0.1, "entropy_coef_max": 0.5}, {"entropy_target": None}),
    ],
)
def test_variations_are_carried_over(theirs, ours):
    recipe = convert({"num_generations": 8, "per_device_train_batch_size": 8, **theirs}, 8)
    assert recipe.lost == [] and loadable(recipe.settings)
    assert {name: recipe.settings.get(name) for name in ours} == ours


def test_a_large_group_is_not_clipped():
    """The largest advantage of G completions is (G - 1) / sqrt(G); ours are clipped at 10, TRL's are not."""
    assert settings_of(num_generations=200, per_device_train_batch_size=200)["advantage_clip"] > 199 / 200**0.5 > 10
    assert "advantage_clip" not in settings_of(num_generations=100, per_device_train_batch_size=100)
    none = settings_of(num_generations=200, per_device_train_batch_size=200, scale_rewards=False)
    assert "advantage_clip" not in none and loadable(none)


# --- docs/from_trl.md


def test_the_page_has_the_tables_and_the_conversion(tmp_path):
    """`python -m grpo.config --trl_names` writes the tables; paste them between the comments."""
    page = (PROJECT / "docs" / "from_trl.md").read_text(encoding="utf-8")
    shown = re.findall(r"<!-- \w+ table: python -m grpo.config --trl_names -->\n(.*?)\n<!-- end -->", page, re.S)
    assert shown == [trl_rewards.markdown_table(), trl_names.markdown_table()]
    recipe, ours = re.findall(r"^```yaml\n(.*?)^```$", page, re.S | re.M)
    file = tmp_path / "my_recipe.yaml"
    file.write_text(recipe)
    text = command.converted(file, 8, 7473)
    assert [x for x in text.split("\n") if x[:1] == "#"] == [x for x in ours.split("\n") if x[:1] == "#"]
    settings = yaml.safe_load(ours)
    assert yaml.safe_load(text) == settings and loadable(settings)
    assert (settings["batch_size"], settings["num_minibatches"], settings["max_steps"]) == (64, 2, 232)


def test_trl_defaults_are_ours_or_written_out():
    """An empty recipe becomes a run with TRL's defaults."""
    trl = pytest.importorskip("trl")
    fields = [field for kind in (trl.GRPOConfig, trl.ModelConfig) for field in dataclasses.fields(kind)]
    theirs = {field.name: field.default for field in fields}
    ours = {**dataclasses.asdict(Config()), **settings_of(8)}
    compared = 0
    for name in from_trl.COPIED:
        default = theirs.get(name)
        if default is not None and name not in ("output_dir", "project", "shuffle_dataset"):
            assert ours[ROWS[name].here] == default, name
            compared += 1
    assert compared >= 15
    assert ours["weighting"] == theirs["loss_type"] and ours["lr_schedule"] == theirs["lr_scheduler_type"]
    assert ours["scale_rewards"] == theirs["scale_rewards"] and ours["save_steps"] == theirs["save_steps"]
    assert ours["optimizer"] == VALUES["optimizer"][theirs["optim"]] and ours["report_to"] == theirs["report_to"]
    assert ours["epoch"] == theirs["num_train_epochs"] and ours["warmup_ratio"] == theirs["warmup_steps"] == 0
    assert (theirs["bf16"], theirs["fp16"], ours["dtype"]) == (None, False, "bf16")
    assert ours["batch_size"] == theirs["per_device_train_batch_size"] * 8 / theirs["num_generations"]
    adapter = settings_of(use_peft=True)
    assert (adapter["lora_r"], adapter["lora_alpha"]) == (theirs["lora_r"], theirs["lora_alpha"])


# --- values that YAML reads as another kind, and values that mean "off"


def test_numbers_within_lists_and_mappings_may_be_written_as_texts():
    given = {"reward_funcs": ["accuracy", "format"], "reward_weights": [1, "1e-1"]}
    settings = convert({**given, "generation_kwargs": {"temperature": "7e-1", "top_k": "20"}}, 1).settings
    assert settings["rewards"] == {"boxed_math_reward": 1, "format_reward": 0.1}
    assert settings["temperature"] == 0.7 and settings["top_k"] == 20
    assert convert({"reward_funcs": "accuracy", "reward_weights": 2.0}, 1).settings["rewards"] == {
        "boxed_math_reward": 2.0
    }
    with pytest.raises(UserError, match="reward_weights: must be one number for each"):
        convert({**given, "reward_weights": [1, "much"]}, 1)
    with pytest.raises(UserError, match="temperature: must be a number, got 'hot'"):
        convert({"generation_kwargs": {"temperature": "hot"}}, 1)


@pytest.mark.parametrize(
    "given, ours, lost",
    [
        (["all"], "tensorboard", True),
        ("mlflow", "tensorboard", True),
        (["wandb", "mlflow"], "wandb", True),
        ("none", "none", False),
        (None, "none", False),
        (["wandb", "tensorboard"], ["wandb", "tensorboard"], False),
    ],
)
def test_a_recipe_that_names_trackers_keeps_curves(given, ours, lost):
    recipe = convert({"report_to": given} if given else {}, 1)
    assert recipe.settings["report_to"] == ours
    assert any(line.startswith("report_to") for line in recipe.lost) is lost


@pytest.mark.parametrize("where", ["", "generation_kwargs"])
@pytest.mark.parametrize("top_k, ours, support", [(-1, 0, None), (50, 50, None), (500, 500, 500)])
def test_top_k(where, top_k, ours, support):
    recipe = convert({where: {"top_k": top_k}} if where else {"top_k": top_k}, 1)
    assert recipe.settings["top_k"] == ours and recipe.settings.get("max_support") == support
    assert any(line.startswith("top_k: at most max_support") for line in recipe.changed) is (ours > 0)
    loadable(recipe.settings)
