"""Rules about time and memory: which phase is slow, who waits, what ran out."""

from statistics import fmean

from grpo.doctor.findings import Evidence
from grpo.doctor.recording import Recording

MIN_STEPS = 4
REWARDS = 0.25  # share of the steps' time spent waiting for scores
ROLLOUT, TAIL = 0.6, 4.0  # share of the time; longest completion as a multiple of the mean
SAVES = 0.15  # seconds of saves that training waits for, as a share of the steps' time
IDLE = 0.3  # share of a phase that the average rank waits for the slowest
MIN_SECONDS = 0.05  # of a step: below, shares are noise


def _share(run: Recording, name: str) -> float:
    total = run.total("time/step_s")
    return run.total(name) / total if total > 0 else 0.0


def _step_seconds(run: Recording) -> float:
    seconds = run.all("time/step_s")
    return fmean(seconds) if len(seconds) >= MIN_STEPS else 0.0


def slow_rewards(run: Recording) -> Evidence | None:
    """Training waits for reward functions."""
    share, seconds = _share(run, "time/reward_s"), _step_seconds(run)
    if seconds < MIN_SECONDS or share < REWARDS:
        return None
    return Evidence(
        {"share": share, "seconds": share * seconds, "step": seconds, "workers": run.setting("reward_workers", 2)}
    )


def long_tail(run: Recording) -> Evidence | None:
    """A few long completions keep the whole rollout waiting."""
    longest, mean = run.all("completions/length_max"), run.all("completions/length_mean")
    share, seconds = _share(run, "time/rollout_s"), _step_seconds(run)
    if run.setting("rollout_engine", "native") != "native":
        return None  # a server batches rows by itself
    if seconds < MIN_SECONDS or share < ROLLOUT or not mean or not longest or fmean(longest) < TAIL * fmean(mean):
        return None
    return Evidence({"share": share, "longest": fmean(longest), "mean": fmean(mean), "step": seconds})


def slow_saves(run: Recording) -> Evidence | None:
    """Training waits for checkpoints."""
    waited = run.total("save/snapshot_s") + run.total("save/wait_s")
    total = run.total("time/step_s")
    if _step_seconds(run) < MIN_SECONDS or total <= 0 or waited < SAVES * total:
        return None
    return Evidence(
        {"waited": waited, "total": total, "share": waited / total, "every": run.setting("save_steps", "?")}
    )


def idle_ranks(run: Recording) -> Evidence | None:
    """Ranks that wait for the slowest one, in the rollout or in the update."""
    if _step_seconds(run) < MIN_SECONDS:
        return None
    for phase, of_time in (("rollout", "time/rollout_s"), ("micro_batches", "time/micro_batches_s")):
        idle = run.all(f"idle/{phase}")
        if idle and fmean(idle) >= IDLE and _share(run, of_time) >= ROLLOUT / 4:
            return Evidence({"phase": phase, "idle": fmean(idle), "share": _share(run, of_time)})
    return None


def out_of_memory(run: Recording) -> Evidence | None:
    """Memory ran out, and work was halved."""
    rollout, update = (int(max(run.all(f"guards/oom_{phase}"), default=0)) for phase in ("rollout", "update"))
    if not rollout and not update:
        return None
    return Evidence({"rollout": rollout, "update": update})
