"""Run a skipped update again, to find where NaN or Inf came from.

    python -m grpo.replay output/anomalies/step_12 [--device cpu|cuda]

Loads the weights of that update and every rank's micro-batches, computes losses and the gradient norm as the trainer
did, and prints them beside the recorded ones, with the first module whose output is not finite. Exit code 0 when the
recorded numbers are reproduced, 1 when not, 2 when something is missing.
"""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from grpo.config.messages import OneLineParser
from grpo.config.names import model_name, with_new_names
from grpo.config.settings import Config
from grpo.errors import UserError, exit_with, warn
from grpo.models.checks import load_model, quiet
from grpo.runtime.devices import pick_device
from grpo.runtime.distributed import World
from grpo.sft.policy import SftPolicy
from grpo.training.load_policy import load_trained
from grpo.training.metrics import Tally
from grpo.training.policy import Policy
from grpo.training.skipped_updates import Evidence
from grpo.types import MicroBatch

TOLERANCE = 1e-4  # relative; other hardware or fewer ranks sum in another order


def read(folder: Path) -> list[tuple[Evidence, list[MicroBatch]]]:
    """Every rank's evidence and micro-batches. Raises UserError."""
    ranks = []
    files = sorted(folder.glob("rank_*.json"))
    if not files:
        raise UserError(f"replay: {folder} holds no rank_R.json. Give a folder like output/anomalies/step_12.")
    for file in files:
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            if "samples" in content:  # the key's name in older evidence
                content["rows"] = content.pop("samples")
            evidence = Evidence(**content)
            tensors = load_file(file.with_suffix(".safetensors"))
            ranks.append((evidence, [_micro_batch(tensors, i, rows) for i, rows in enumerate(evidence.rows)]))
        except (OSError, ValueError, TypeError, KeyError, AssertionError, SafetensorError) as error:
            raise UserError(
                f"replay: {file} or the tensors beside it cannot be read ({error}). Choose another."
            ) from None
    return ranks


def _micro_batch(tensors: dict[str, Tensor], index: int, rows: list[int]) -> MicroBatch:
    prefix = f"micro_{index}."
    fields = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    if "mask" in fields:  # older evidence: every token of a completion was trained
        fields["trained"] = fields.pop("mask")
        fields["lengths"] = fields["trained"].sum(-1)
    return MicroBatch(rows=tuple(rows), **fields)  # type: ignore[arg-type]


def load_policy_of(folder: Path, evidence: Evidence, device: torch.device) -> Policy:
    """The policy as one rank had it at the skipped update. Raises UserError."""
    names = {f.name for f in dataclasses.fields(Config)}
    cfg = Config(**{k: v for k, v in with_new_names(evidence.config).items() if k in names})
    cfg = dataclasses.replace(cfg, backend="single", deterministic=False)
    assert cfg.model is not None
    file = (folder / evidence.weights).resolve()
    if file.parent.parent != folder.resolve().parent or not file.is_file():
        raise UserError(f"replay: the weights {evidence.weights} of rank {evidence.rank} do not exist any more.")
    model = load_trained(cfg, device)
    try:
        missing, unexpected = model.load_state_dict(load_file(file), strict=False)
    except (SafetensorError, RuntimeError) as error:
        raise UserError(f"replay: {file} does not fit {cfg.model} ({str(error).splitlines()[0]}).") from None
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - set(dict(model.named_parameters()))
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    if unexpected or set(missing) - tied - frozen - {name for name, _ in model.named_buffers()}:
        raise UserError(f"replay: {file} is not a copy of {cfg.model}'s weights.")
    reference = load_model(model_name(cfg), device) if cfg.beta > 0 and not cfg.lora_r else None
    policy = (SftPolicy if cfg.sft else Policy)(cfg, World(0, 1, 0, 1, device), model, reference)
    for name in ("trust_sampler", "updates", "entropy_coef", "last_entropy"):
        setattr(policy.counters, name, getattr(evidence, name))
    if evidence.num_tokens is not None:
        policy.limit_tokens(evidence.num_tokens)
    return policy


class FirstBadModule:
    """Remembers the first module whose output is not finite."""

    def __init__(self, model: PreTrainedModel):
        self.name: str | None = None
        for name, module in model.named_modules():
            if not any(module.children()):
                module.register_forward_hook(lambda _m, _i, output, name=name: self._look(name, output))

    def _look(self, name: str, output: Any) -> None:
        if self.name is None and isinstance(output, Tensor) and not bool(torch.isfinite(output).all()):
            self.name = name


def replay(folder: Path, device: torch.device) -> bool:
    """Run every rank's part again, print recorded and replayed numbers. Returns whether they agree."""
    same = True
    gradients: dict[str, Tensor] = {}  # summed over ranks
    evidence = None
    for evidence, minibatch in read(folder):
        policy = load_policy_of(folder, evidence, device)
        print(f"rank {evidence.rank}: {evidence.reason}; weights {evidence.weights}")
        for name in (n for n, p in policy.model.named_parameters() if not bool(torch.isfinite(p).all())):
            print(f"  weights that are not finite: {name}")
        bad_module = FirstBadModule(policy.model)
        for i, micro in enumerate(minibatch):
            tensors = {f.name: getattr(micro, f.name) for f in dataclasses.fields(micro)}
            moved = {name: value.to(device) for name, value in tensors.items() if isinstance(value, Tensor)}
            micro = MicroBatch(**{**tensors, **moved})
            if not evidence.losses and evidence.config.get("rollout_ahead"):
                raise UserError(
                    f"replay: {folder}: logits of the rollout were not finite, and with rollout_ahead older weights "
                    "sampled it, which were not kept. It cannot be replayed."
                )
            if not evidence.losses:
                same &= _replay_rollout(policy, micro)
                continue
            policy.backend.train(True)
            policy.key_dropout(micro)
            loss = policy.loss(micro, Tally(), weights_unchanged=evidence.iteration == 0)
            loss.backward()
            recorded, replayed = float(evidence.losses[i]), float(loss.detach())
            same &= agree(recorded, replayed)
            where = f"micro-batch {i}, rows {list(micro.rows)}"
            print(f"  {where}: loss recorded {recorded:.6g}, replayed {replayed:.6g}")
        if bad_module.name:
            print(f"  first module whose output is not finite: {bad_module.name}")
        for name, parameter in policy.model.named_parameters():
            if parameter.grad is not None:
                gradients[name] = gradients.get(name, 0.0) + parameter.grad
    if evidence is not None and evidence.losses:
        recorded = float(evidence.reason.removeprefix("gradient norm "))
        norm = float(nn.utils.get_total_norm(list(gradients.values()))) if gradients else 0.0
        same &= agree(recorded, norm)
        print(f"gradient norm over all ranks: recorded {recorded:.6g}, replayed {norm:.6g}")
    return same


@torch.no_grad()
def _replay_rollout(policy: Policy, micro: MicroBatch) -> bool:
    """Whether all rows whose logits were not finite give log-probs that are not finite again."""
    logprobs = policy.backend.score(micro)
    broken = (~torch.isfinite(logprobs) & micro.trained).any(-1)
    print(f"  rows {list(micro.rows)} had logits that were not finite; replayed: {broken.tolist()}")
    return bool(broken.all())


def agree(recorded: float, replayed: float) -> bool:
    """Whether a number is reproduced: both not finite, or equal within the tolerance.

    >>> agree(math.nan, math.nan), agree(1.0, 1.00001), agree(math.nan, 1.0)
    (True, True, False)
    """
    if not math.isfinite(recorded):
        return not math.isfinite(replayed)
    return math.isclose(recorded, replayed, rel_tol=TOLERANCE, abs_tol=1e-7)


def main(argv: list[str]) -> int:
    """The command line. Returns the exit code."""
    parser = OneLineParser(prog="python -m grpo.replay", description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="output_dir/anomalies/step_N")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    try:
        args = parser.parse_args(argv)
        quiet()
        same = replay(args.folder, pick_device(args.device, 0))
    except UserError as error:
        warn(f"error: {error}")
        return error.code
    print("the recorded numbers came out again" if same else "other numbers came out: not reproduced")
    return 0 if same else 1


if __name__ == "__main__":
    exit_with(main)
