"""Rules about rewards: whether they are given, differ within groups, and rise."""

from collections.abc import Sequence
from statistics import fmean, pstdev

from grpo.doctor.findings import Evidence
from grpo.doctor.recording import Recording, Row

MIN_STEPS = 4  # below, thirds of the run say nothing
PENALTIES = ("overlong_reward", "repetition_reward")  # of the library: never above 0
NO_VARIANCE = 0.75  # share of groups without variance: three quarters of the sampling is wasted
NEAR = 0.15  # of the range of rewards: so near to its lowest or highest value
LEARNED = 0.8  # share of a reward's highest value at which the model has learned what it rewards
FAILED = 0.01  # share of reward calls
FLAT_STEPS = 12  # steps after which a rise should be seen
FLAT_Z = 2.0  # standard errors: less is not a measurable rise
SMALL = 0.1  # of the range of rewards: a larger gain is none that is missing
FALL = 0.4  # share of what had been gained, or of the range: lost again
FALL_Z = 3.0
HELD_OUT_FALL = 0.05  # of accuracy


def no_reward(run: Recording) -> Evidence | None:
    """Steps without any reward: every function gave None for every completion."""
    sampled = [metrics for metrics in run.steps if "completions/length_mean" in metrics]
    without = [metrics for metrics in sampled if "reward/mean" not in metrics]
    if not without or len(without) < max(1, len(run.steps) // 4):
        return None
    return Evidence({"count": len(without), "steps": len(run.steps)}, run.last_rows[-1] if run.last_rows else None)


def reward_failures(run: Recording) -> Evidence | None:
    """Reward calls that failed or came too late."""
    shares = {name: run.all(f"reward/{name}/failures") for name in run.reward_names}
    worst, share = max(
        ((name, fmean(values)) for name, values in shares.items() if values), key=lambda x: x[1], default=("", 0.0)
    )
    if share < FAILED:
        return None
    late = run.all(f"reward/{worst}/timeouts")
    return Evidence(
        {
            "name": worst,
            "share": share,
            "late": fmean(late) if late else 0.0,
            "calls": int(run.total("reward/failures")),
        }
    )


def _to_be_earned(run: Recording) -> list[str]:
    """Short names of reward functions that count, penalties left out: 0 is the best that these give."""
    given = run.setting("rewards")
    weights = list(given.values()) if isinstance(given, dict) else []
    counted = len(weights) == len(run.reward_names)
    names = [name for at, name in enumerate(run.reward_names) if not (counted and weights[at] == 0)]
    return [name for name in names if name not in PENALTIES and "penalty" not in name]


def never_given(run: Recording) -> Evidence | None:
    """A reward function with one and the same score, 0 or less, for every completion of the run."""
    if len(run.steps) < MIN_STEPS:
        return None
    for name in _to_be_earned(run):
        means, stds = run.all(f"reward/{name}/mean"), run.all(f"reward/{name}/std")
        if not means or len(means) < len(run.steps) // 2 or max(stds, default=0.0) > 0:
            continue
        if len(set(means)) == 1 and means[0] <= 0:
            best = _nearest(run, run.rows)
            return Evidence({"name": name, "score": means[0], "steps": len(means)}, best, _why(run, best))
    return None


def too_hard(run: Recording) -> Evidence | None:
    """Most groups have no variance, and the reward is near its lowest value."""
    if len(run.steps) < MIN_STEPS or not (zero := run.last("reward/zero_std_groups")) or not run.last("reward/mean"):
        return None
    low, high = run.range_of()
    mean, share = fmean(run.last("reward/mean")), fmean(zero)
    given = max(run.all("reward/std"), default=0.0) > 0
    if not given or share < NO_VARIANCE or mean > low + NEAR * (high - low):
        return None
    lost = [row for row in run.last_rows if row.reward is not None and row.reward <= low + NEAR * (high - low)]
    best = _nearest(run, lost)
    return Evidence({"share": share, "mean": mean, "low": low, "high": high, **run.span()}, best, _why(run, best))


def too_easy(run: Recording) -> Evidence | None:
    """Most groups have no variance from the start, and the reward is near its highest value."""
    if len(run.steps) < MIN_STEPS or not (zero := run.first("reward/zero_std_groups")) or not run.first("reward/mean"):
        return None
    low, high = run.range_of()
    mean, share = fmean(run.first("reward/mean")), fmean(zero)
    if share < NO_VARIANCE or mean < high - NEAR * (high - low):
        return None
    return Evidence({"share": share, "mean": mean, "high": high, "steps": run.third})


def one_sided(run: Recording) -> Evidence | None:
    """One reward function is nearly always satisfied, another nearly never, and it does not rise: the format alone."""
    if len(run.steps) < MIN_STEPS or len(run.reward_names) < 2:
        return None
    learned: list[tuple[float, str]] = []
    missed: list[tuple[float, str]] = []
    for name in _to_be_earned(run):
        low, high = run.range_of(name)
        rise = run.rise(f"reward/{name}/mean")
        if rise is None:
            continue
        if rise.last >= low + LEARNED * (high - low) and high > low:
            learned.append((rise.last, name))
        elif rise.last <= low + NEAR * (high - low) and rise.last - rise.first < NEAR * (high - low) / 2:
            missed.append((rise.last, name))
    if not learned or not missed:
        return None
    (got, given), (left, other) = max(learned), min(missed)
    lost = [row for row in run.last_rows if row.reward is not None]
    best = _nearest(run, lost)
    return Evidence(
        {"given": given, "got": got, "other": other, "left": left, **run.span()}, best, _why(run, best, other)
    )


def reward_flat(run: Recording) -> Evidence | None:
    """Groups have variance and updates are made, and the reward has not risen."""
    if len(run.steps) < FLAT_STEPS or (rise := run.rise("reward/mean")) is None:
        return None
    low, high = run.range_of()
    zero = run.all("reward/zero_std_groups")
    at_top = rise.last >= low + (1 - NEAR) * (high - low)
    rises = rise.z >= FLAT_Z or rise.last - rise.first >= SMALL * (high - low)
    if rises or at_top or (zero and fmean(zero) >= NO_VARIANCE) or not run.all("grad_norm"):
        return None
    if max(run.all("grad_norm")) <= 0:
        return None
    clip = fmean([*run.all("clip/low"), 0.0]) + fmean([*run.all("clip/high"), 0.0])
    rates = run.all("lr")
    values = {"first": rise.first, "last": rise.last, "z": rise.z, "steps": len(run.steps), "clip": clip}
    return Evidence(values | {"lr": max(rates) if rates else 0.0})


def reward_fell(run: Recording) -> Evidence | None:
    """The reward rose and was lost again, or fell from where it started."""
    means = run.all("reward/mean")
    if len(means) < 2 * MIN_STEPS:
        return None
    low, high = run.range_of()
    width = max(2, len(means) // 6)
    averages = [fmean(means[at : at + width]) for at in range(len(means) - width + 1)]
    peak = max(range(len(averages)), key=averages.__getitem__)
    end = averages[-1]
    noise = pstdev(_differences(means)) / 2**0.5  # of one step's mean, without its trend
    lost = averages[peak] - end
    if lost < FALL * max(averages[peak] - low, NEAR * (high - low)) or lost < FALL_Z * noise * (2 / width) ** 0.5:
        return None
    at = int(run.steps[min(peak + width // 2, len(run.steps) - 1)]["step"])
    norms, rates = run.all("grad_norm"), run.all("lr")
    values = {"peak": averages[peak], "at": at, "last": end, "lr": max(rates) if rates else 0.0}
    return Evidence(values | {"norm": fmean(norms) if norms else 0.0, "max_norm": run.number("max_grad_norm", 1.0)})


def _differences(values: Sequence[float]) -> list[float]:
    return [b - a for a, b in zip(values, values[1:])]


def held_out_fell(run: Recording) -> Evidence | None:
    """The reward in training rises while accuracy on held-out questions falls."""
    name = next((name for metrics in run.evals for name in metrics if name.endswith("/accuracy")), None)
    rise = run.rise("reward/mean")
    values = [(int(metrics["step"]), metrics[name]) for metrics in run.evals if name is not None and name in metrics]
    if len(values) < 2 or rise is None or rise.z < FLAT_Z:
        return None
    (at, best), (_, last) = max(values[:-1], key=lambda one: one[1]), values[-1]
    if best - last < HELD_OUT_FALL:
        return None
    return Evidence({"name": name, "best": best, "at": at, "last": last, "before": rise.first, "after": rise.last})


def _nearest(run: Recording, rows: Sequence[Row]) -> Row | None:
    """The completion that came nearest to a reward: by its reward, then by holding the gold answer, then by ending."""
    if not rows:
        return None
    return max(
        rows,
        key=lambda row: (
            row.reward if row.reward is not None else -1e30,
            _holds_gold(row),
            row.finish == "stop",
            row.step,
        ),
    )


def _holds_gold(row: Row) -> bool:
    return bool(row.gold) and row.gold in row.completion  # type: ignore[operator]


def _why(run: Recording, row: Row | None, name: str | None = None) -> str | None:
    """Why a completion got no reward, as far as it shows; a key in WHY of the texts."""
    if row is None:
        return None
    if not row.completion.strip():
        return "empty"
    if row.extracted is not None and row.gold is not None and row.extracted.strip() != row.gold.strip():
        return "other_answer"
    if _holds_gold(row):
        return "not_where_read"
    if row.finish == "length":
        return "cut"
    if row.extracted is None and (any(one.extracted is not None for one in run.rows) or _asks_for_marks(run)):
        return "no_marks"
    return None if row.gold is None else "no_gold"


def _asks_for_marks(run: Recording) -> bool:
    prompt = f"{run.setting('system_prompt') or ''} {run.setting('prompt_template') or ''}"
    return any(mark in prompt for mark in ("<answer>", "<SOLUTION>", "####", "\\boxed"))
