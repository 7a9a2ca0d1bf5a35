"""How the run ended."""

from grpo.doctor.findings import Evidence
from grpo.doctor.recording import Recording


def stopped(run: Recording) -> Evidence | None:
    """The run ended with an error."""
    if run.ended is None or run.ended[0] in (0, 75):
        return None
    code, reason = run.ended
    return Evidence({"code": code, "reason": reason, "steps": len(run.steps)})
