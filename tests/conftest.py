"""The two tiers, and thread counts that do not depend on the machine's mood."""

import gc
import os

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


SECOND_PART = tuple(f"tests/{room}/" for room in ("evaluate", "faults", "models", "run", "runtime", "scripts", "sft"))


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="run the long tier too")
    parser.addoption("--part", choices=["1", "2"], help="run one half of the tests: two such runs use two cores")


def pytest_collection_modifyitems(config, items):
    part = config.getoption("--part")
    if part is not None:
        items[:] = [item for item in items if (item.nodeid.startswith(SECOND_PART)) == (part == "2")]
    for item in items:
        if item.get_closest_marker("full") and not config.getoption("--full"):
            item.add_marker(pytest.mark.skip(reason="long tier: run with --full"))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device here"))


def pytest_collection_finish(session):
    gc.collect()
    gc.freeze()  # what was imported stays: no collection need look at it again


@pytest.fixture(autouse=True, scope="session")
def _threads():
    # for models this small a second thread costs more than it gives, on a busy machine far more
    torch.set_num_threads(1)
