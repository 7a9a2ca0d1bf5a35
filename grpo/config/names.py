"""Names that users give: of paths, models and trackers, and the old names of settings."""

from pathlib import Path
from typing import Any

from grpo.config.settings import PROJECT, Config

OLD_NAMES = {"loss": "weighting"}  # of settings, in configurations and checkpoints


def with_new_names(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings as an older version wrote them, under their present names.

    >>> with_new_names({"loss": "dapo", "lr": 1e-6})
    {'weighting': 'dapo', 'lr': 1e-06}
    """
    return {OLD_NAMES.get(name, name): value for name, value in settings.items()}


def model_name(cfg: Config) -> str:
    """The model as grpo.models takes it, its revision after an @.

    >>> model_name(Config(model="user/tiny", model_revision="v1"))
    'user/tiny@v1'
    """
    assert cfg.model is not None
    return cfg.model if cfg.model_revision is None else f"{cfg.model}@{cfg.model_revision}"


def tracker_names(cfg: Config) -> list[str]:
    """The trackers of `report_to`, without none.

    >>> tracker_names(Config(report_to="none")), tracker_names(Config(report_to=["wandb", "tensorboard"]))
    ([], ['wandb', 'tensorboard'])
    """
    names = [cfg.report_to] if isinstance(cfg.report_to, str) else list(cfg.report_to)
    return [name for name in names if name != "none"]


def find_path(name: str) -> Path | None:
    """A path given by the user, relative to the working folder, else to the project's. None: no such file.

    >>> find_path("configs/demo.yaml").name
    'demo.yaml'
    """
    for base in (Path(), PROJECT):
        try:
            path = base / Path(name).expanduser()
            if path.exists():
                return path
        except (OSError, ValueError, RuntimeError):  # too long, a NUL, no such home: not a path
            continue
    return None
