"""How many threads a process computes with."""

import os

import pytest
import torch

from grpo.runtime.devices import set_threads

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


@pytest.fixture(autouse=True)
def as_before():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    "variable, num_threads, local_size, expected",
    [
        ("3", None, 1, 3),
        ("5,2", None, 1, 5),  # OpenMP's list: threads of nested regions
        (" 3 ", None, 1, 3),
        ("3", 7, 1, 7),  # the setting wins
        (None, None, 1, CORES),
        ("", None, 1, CORES),
        ("0", None, 1, CORES),
        ("-2", None, 1, CORES),
        ("many", None, 1, CORES),
        ("３", None, 1, CORES),  # a digit, but not OpenMP's
        ("1", None, 2, max(1, CORES // 2)),  # torchrun's own choice for several processes
        ("1", 4, 2, 4),
    ],
)
def test_threads(monkeypatch, variable, num_threads, local_size, expected):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if variable is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    torch.set_num_threads(9)
    set_threads(num_threads, local_size)
    assert torch.get_num_threads() == expected
