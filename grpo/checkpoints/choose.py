"""Choosing a checkpoint: the one that the user names, or the newest valid one of a folder."""

from pathlib import Path

from grpo.checkpoints.contents import newest_valid
from grpo.checkpoints.manifest import verify
from grpo.errors import UserError, warn
from grpo.models.lora_checks import is_adapter


def choose(checkpoint: Path | None, output_dir: Path) -> Path:
    """A verified checkpoint: `checkpoint`, or the newest valid one in output_dir when it is None. Raises UserError."""
    if checkpoint is None:
        newest = newest_valid(output_dir, warn)
        if newest is None:
            raise UserError(
                f"checkpoint: none in {output_dir}. Train one first (python train.py), or use --checkpoint."
            )
        return newest
    try:
        found = (checkpoint / "config.json").is_file() or is_adapter(checkpoint)
    except (OSError, ValueError) as error:  # a path too long, or not a path
        raise UserError(f"checkpoint: not a path: {error}. Give a folder such as output/checkpoint_20.") from None
    if not found:
        raise UserError(f"checkpoint: no model in {checkpoint}. Give a folder such as output/checkpoint_20.")
    problem = verify(checkpoint)
    if problem is not None:
        raise UserError(f"checkpoint: {checkpoint} cannot be trusted: {problem}. Choose another checkpoint.")
    return checkpoint
