"""The figures behind tests/training/test_invariance.py: its jobs, its measures, as a table.

    python benchmarks/invariance.py [--max_ranks 4] [--folder FOLDER]

For each number of processes W and each backend: (a) whether equal weights gave equal tokens; (b) how far 20 updates on
injected rollouts end from those of one process, as a share of the way travelled; (c) whether the weights are the same
bits. Then the broken controls, and the deterministic mode. With --folder, what an earlier run left there is read
(`pytest tests/training/test_invariance.py --full --basetemp FOLDER` leaves it in FOLDER/invariance0).
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from safetensors.torch import load_file

from tests.support.launcher import run_ranks
from tests.training.test_invariance import BACKENDS, BROKEN, VARIANTS, distance, flat, jobs_of

NAMES = {"ddp": "ddp (W = 1: single)", **{f"zero{stage}": f"ZeRO-{stage}" for stage in range(4)}}


class Results:
    """What the jobs of each W gave."""

    def __init__(self, folder: Path, max_ranks: int):
        self.folder = folder
        self.reports: dict[int, dict] = {}
        for ranks in range(1, max_ranks + 1):
            jobs = jobs_of(ranks)
            out = folder / str(ranks)
            if all((out / f"rank_{rank}.json").exists() for rank in range(ranks)):
                assert json.loads((out / "jobs.json").read_text()) == json.loads(json.dumps([*jobs.values()]))
                by_rank = [json.loads((out / f"rank_{rank}.json").read_text()) for rank in range(ranks)]
            else:
                by_rank = run_ranks(list(jobs.values()), ranks, out, timeout=900)
            self.reports[ranks] = {key: [rank[i] for rank in by_rank] for i, key in enumerate(jobs)}

    def weights(self, ranks: int, job: str):
        """The weights at the end of a job that saved them."""
        return flat(load_file(self.folder / str(ranks) / f"{job}.safetensors"))

    def tokens(self, ranks: int, name: str) -> dict:
        """Every row's token ids and finish reason, from all ranks."""
        rows = {k: v for rank in self.reports[ranks]["rollout", name] for k, v in rank.items()}
        return {sample: (ids, finish) for sample, (ids, _, finish) in rows.items()}

    def sha256(self, ranks: int, kind: str, name: str) -> str:
        """Hash of the weights at the end; every rank has the same."""
        [digest] = {rank["sha256"] for rank in self.reports[ranks][kind, name]}
        return digest


def print_backends(found: Results) -> None:
    """(a), (b), (c) for backend x W."""
    start, tokens = found.weights(1, "update ddp"), found.tokens(1, "ddp")
    digest = found.sha256(1, "update", "ddp")
    print("Each cell: (a) equal tokens, (b) distance, (c) same bits; against ddp on one process.\n")
    print("| backend | " + " | ".join(f"W = {ranks}" for ranks in found.reports) + " |")
    print("| --- |" + " --- |" * len(found.reports))
    for backend, name in NAMES.items():
        cells = []
        for ranks in found.reports:
            same = "yes" if found.tokens(ranks, backend) == tokens else "**no**"
            bits = "yes" if found.sha256(ranks, "update", backend) == digest else "no"
            far = distance(start, found.weights(ranks, f"update {backend}"))
            cells.append(f"{same}, {far:.1e}, {bits}")
        print(f"| {name} | " + " | ".join(cells) + " |")


def print_variants(found: Results) -> None:
    """(b) for the other settings, each against the same setting on one process."""
    print("\n| setting | " + " | ".join(f"{ranks} processes" for ranks in found.reports if ranks > 1) + " |")
    print("| --- |" + " ---: |" * (len(found.reports) - 1))
    for name in VARIANTS:
        start = (
            found.weights(1, f"update {name.removeprefix('zero3 ')}")
            if name.removeprefix("zero3 ") in VARIANTS
            else found.weights(1, "update ddp")
        )
        far = [distance(start, found.weights(ranks, f"update {name}")) for ranks in found.reports if ranks > 1]
        print(f"| {name} | " + " | ".join(f"{value:.1e}" for value in far) + " |")


def print_controls(found: Results) -> None:
    """Broken on purpose, on two processes."""
    start = found.weights(1, "update ddp")
    print("\n| control, 2 processes | distance |\n| --- | ---: |")
    for n, name in enumerate(BROKEN):
        print(f"| {name} | {distance(start, found.weights(2, f'broken {n}')):.1e} |")
    other = found.tokens(1, "another seed")
    equal = sum(other[sample] == row for sample, row in found.tokens(1, "ddp").items())
    print(f"| another seed of the rollout: rows with equal tokens | {equal} of {len(other)} |")


def print_bits(found: Results) -> None:
    """(c): deterministic and plain, free-running and on injected rollouts."""
    print("\n| sha256, first 12 digits | " + " | ".join(f"W = {ranks}" for ranks in found.reports) + " |")
    print("| --- |" + " --- |" * len(found.reports))
    rows = {
        "deterministic, free-running, 5 steps": ("free", "deterministic"),
        "deterministic, 20 injected updates": ("update", "deterministic"),
        "control: ddp, 20 injected updates": ("update", "ddp"),
    }
    for title, key in rows.items():
        cells = [f"`{found.sha256(ranks, *key)[:12]}`" for ranks in found.reports]
        print(f"| {title} | " + " | ".join(cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--max_ranks", type=int, default=4)
    parser.add_argument("--folder", type=Path, help="where an earlier run's results lie; none: run now")
    args = parser.parse_args()
    assert set(NAMES) == set(BACKENDS)
    with tempfile.TemporaryDirectory() as name:
        found = Results(args.folder or Path(name), args.max_ranks)
        for table in (print_backends, print_variants, print_controls, print_bits):
            table(found)


if __name__ == "__main__":
    main()
