"""Rules about updates: entropy, learning rate, skipped updates, the sampler's log-probs."""

from statistics import fmean, median

from grpo.doctor.findings import Evidence
from grpo.doctor.recording import Recording

MIN_STEPS = 6
COLLAPSED = 0.35  # of the entropy at the start
EXPLODED = 1.5
TOP = 0.85  # of the range of rewards: a model that is nearly always right may be certain
Z = 2.0  # standard errors
CLIPPED = 0.2  # share of trained tokens whose gradient the clip stops; usual are a few percent
MOVED = 0.1  # KL of old and new policy within a step, in nats; usual are less than 0.01
NORM = 10.0  # times max_grad_norm: the clip decides the size of every step
GAP = 0.05  # mean absolute difference of log-probs; fp32 has 1e-6, bf16 up to 0.02
ESS = 0.9  # effective sample size


def skipped_updates(run: Recording) -> Evidence | None:
    """Updates that met NaN or Inf."""
    counts = run.all("guards/skipped_updates")
    if not counts or max(counts) < 1:
        return None
    first = next(int(metrics["step"]) for metrics in run.steps if metrics.get("guards/skipped_updates", 0) >= 1)
    rates = run.all("lr")
    return Evidence({"count": int(max(counts)), "steps": len(counts), "at": first, "lr": max(rates) if rates else 0.0})


def entropy_collapse(run: Recording) -> Evidence | None:
    """The entropy is gone before the task is learned: groups agree, and the reward has stopped rising."""
    entropy, zero, reward = (run.rise(name) for name in ("entropy", "reward/zero_std_groups", "reward/mean"))
    if len(run.steps) < MIN_STEPS or entropy is None or zero is None or reward is None:
        return None
    low, high = run.range_of()
    start = fmean(run.all("entropy")[: max(2, len(run.steps) // 8)])  # it may be gone within the first third
    if start <= 0 or entropy.last > COLLAPSED * start or reward.last >= low + TOP * (high - low):
        return None
    means = run.all("reward/mean")
    half = len(means) // 2
    recent = fmean(means[-max(1, half // 2) :]) - fmean(means[half : max(half + 1, len(means) - half // 2)])
    if zero.last < max(0.5, zero.first) or recent > 0.05 * (high - low):
        return None
    values = {"first": start, "last": entropy.last, "zero": zero.last, "mean": reward.last}
    return Evidence(values | {"lr": max([*run.all("lr"), 0.0]), **run.span()})


def entropy_explosion(run: Recording) -> Evidence | None:
    """The entropy grows while the reward falls: the model is being destroyed."""
    entropy, reward = run.rise("entropy"), run.rise("reward/mean")
    if len(run.steps) < MIN_STEPS or entropy is None or reward is None:
        return None
    if entropy.first <= 0 or entropy.last < EXPLODED * entropy.first or entropy.z < Z or reward.z > -Z:
        return None
    bonus = run.number("entropy_coef", 0.0)
    values = {"first": entropy.first, "last": entropy.last, "before": reward.first, "after": reward.last}
    return Evidence(values | {"lr": max([*run.all("lr"), 0.0]), "bonus": bonus})


def clip_share(run: Recording) -> Evidence | None:
    """The policy moves far within one step: far from the old one, or the clip stops the gradient of many tokens."""
    low, high, moved = run.all("clip/low"), run.all("clip/high"), run.all("kl_old")
    share, kl = _mean(low) + _mean(high), _mean(moved)
    if len(run.steps) < MIN_STEPS or (share < CLIPPED and kl < MOVED):
        return None
    updates = int(run.number("num_iterations", 1) * run.number("num_minibatches", 1)) if run.config else None
    values = {"share": share, "updates": updates, "kl": kl, "eps": run.number("clip_eps", 0.2)}
    return Evidence(values | {"lr": max([*run.all("lr"), 0.0])})


def _mean(values: list[float]) -> float:
    return fmean(values) if values else 0.0


def grad_norm(run: Recording) -> Evidence | None:
    """Gradient norms far above the clip."""
    norms, limit = run.last("grad_norm"), run.number("max_grad_norm", 1.0)
    if len(run.steps) < MIN_STEPS or not norms or median(norms) < NORM * limit:
        return None
    first = run.first("grad_norm")
    return Evidence({"norm": median(norms), "first": median(first) if first else None, "limit": limit, **run.span()})


def sampler_gap(run: Recording) -> Evidence | None:
    """Sampler and trainer give the same tokens different log-probs."""
    gaps, ess = run.all("sampler_gap/mean"), run.all("sampler/ess")
    gap = fmean(gaps) if gaps else 0.0
    size = fmean(ess) if ess else 1.0
    if len(run.steps) < MIN_STEPS or (gap < GAP and size >= ESS) or run.setting("rollout_ahead", 0):
        return None  # ahead, they are two policies
    corrected = run.all("clip/importance")
    values = {"gap": gap, "ess": size, "corrected": fmean(corrected) if corrected else 0.0}
    return Evidence(values | {"dtype": run.setting("dtype", "?"), "largest": max([*run.all("sampler_gap/max"), 0.0])})
