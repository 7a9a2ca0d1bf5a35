"""The listed breakages (tests/breakages.py) still fit the code that they break."""

import re

import pytest

from tests.breakages import BREAKAGES, PROJECT


@pytest.mark.parametrize("breakage", BREAKAGES, ids=lambda breakage: breakage.name)
def test_the_text_occurs_once_and_its_tests_exist(breakage):
    broken = breakage.applied(PROJECT)
    assert broken != (PROJECT / breakage.file).read_text(encoding="utf-8")
    if breakage.file.endswith(".py"):
        compile(broken, breakage.file, "exec")
    for test in breakage.tests:
        file, _, name = test.partition("::")
        assert re.search(rf"^def {name.partition('[')[0]}\(", (PROJECT / file).read_text(encoding="utf-8"), re.M), test


def test_every_breakage_has_a_name_of_its_own():
    assert len({breakage.name for breakage in BREAKAGES}) == len(BREAKAGES) >= 20
