"""The setting `algorithm`: what a preset fills in, what wins over it, and what is said of it."""

import typing

import pytest

from grpo.config.algorithm import PRESETS, TABLE
from grpo.config.checks import check
from grpo.config.command_line import load_config, load_sft_config
from grpo.config.settings import Config
from grpo.training.surrogates import SURROGATES
from tests.support.launcher import PROJECT

NEEDED = ["--model", "m", "--data", "d", "--rewards", '{"mark_reward": 1.0}']


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_fills_its_settings_and_goes_together(name):
    cfg, notice = load_config([*NEEDED, "--algorithm", name])
    assert {key: getattr(cfg, key) for key in PRESETS[name]} == PRESETS[name]
    others = {key: value for key, value in vars(cfg).items() if key not in ("algorithm", *PRESETS[name])}
    plain, _ = load_config(NEEDED)
    assert others == {key: getattr(plain, key) for key in others}
    assert notice.startswith(f"algorithm {name}: ") and "Given otherwise" not in notice


def test_what_is_given_wins_wherever_it_stands(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("clip_eps: 0.1\nalgorithm: gspo\n")
    for argv in ([*NEEDED, "--config", str(file)], ["--config", str(file), *NEEDED]):
        cfg, notice = load_config(argv)
        assert (cfg.clip_eps, cfg.clip_eps_high, cfg.ratio) == (0.1, 4e-4, "sequence")
        assert notice == "algorithm gspo: ratio sequence, clip_eps_high 0.0004. Given otherwise: clip_eps 0.1."
    cfg, _ = load_config(["--clip_eps=0.3", "--config", str(file), *NEEDED, "--algorithm=dapo"])
    assert (cfg.clip_eps, cfg.clip_eps_high, cfg.ratio, cfg.weighting) == (0.3, 0.28, "token", "dapo")
    cfg, notice = load_config(["--config", str(file), *NEEDED, "--algorithm", "null"])
    assert (cfg.algorithm, cfg.ratio, notice) == (None, "token", None)


def test_the_default_given_by_hand_also_wins():
    cfg, _ = load_config([*NEEDED, "--algorithm", "gspo", "--ratio", "token"])
    assert cfg.ratio == "token"


def test_the_supervised_stage_reads_the_same_file(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(
        "model: m\ndata: d\nrewards: {mark_reward: 1}\nalgorithm: cispo\nsft: {lr: 1.0e-4, solution_column: answer}\n"
    )
    assert load_config(["--config", str(file)])[0].surrogate == "cispo"
    assert load_sft_config(["--config", str(file)])[0].lr == 1e-4


def test_names_and_tables_are_complete():
    [names, _] = typing.get_args(typing.get_type_hints(Config)["algorithm"])
    assert set(typing.get_args(names)) == set(PRESETS) and set(TABLE) == set(SURROGATES)
    page = (PROJECT / "docs" / "algorithms.md").read_text(encoding="utf-8")
    for name, preset in PRESETS.items():
        check(Config(model="m", data="d", rewards={"mark_reward": 1.0}, algorithm=name, **preset))
        [line] = [line for line in page.splitlines() if line.startswith(f"| `{name}` |") and "arXiv" in line][:1]
        for key, value in preset.items():
            shown = str(value).lower() if isinstance(value, bool) else value
            assert f"`{key}: {shown}`" in line, (name, key)
