"""The rooms of grpo/: few, each explained, and importing only from lower floors."""

import ast
from pathlib import Path

import pytest

import grpo

GRPO = Path(grpo.__file__).parent
FLOORS = [  # from the ground up; rooms of one floor do not import each other
    {"types", "errors", "randomness", "strict_json"},
    {"config"},
    {"forward", "runtime"},
    {"models", "rewards"},
    {"data", "rollout", "reward_library"},
    {"training"},
    {"checkpoints", "plan", "doctor"},
    {"run"},
    {"evaluate", "export", "view"},
    {"sft"},
    {"replay"},
]
FLOOR_OF = {room: number for number, floor in enumerate(FLOORS) for room in floor}
SOURCES = sorted(GRPO.rglob("*.py"))


def room_of(path: Path) -> str:
    """The folder under grpo/, or the file that stands there itself.

    >>> room_of(GRPO / "data" / "filters.py"), room_of(GRPO / "types.py")
    ('data', 'types')
    """
    return path.relative_to(GRPO).with_suffix("").parts[0]


def imported_rooms(text: str) -> set[str]:
    """Rooms that a file imports from, inside functions too.

    >>> sorted(imported_rooms("import grpo.data.filters\\ndef f():\\n    from grpo import errors"))
    ['data', 'errors']
    """
    modules: list[str] = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            modules += [f"{node.module}.{alias.name}" for alias in node.names]
    parts = [module.split(".") for module in modules]
    return {names[1] for names in parts if names[0] == "grpo" and len(names) > 1}


def test_the_floors_name_every_room():
    rooms = {room_of(path) for path in SOURCES} - {"__init__"}
    assert rooms == set(FLOOR_OF)


def test_grpo_has_few_files_and_about_a_dozen_folders():
    assert len([path for path in GRPO.glob("*.py")]) <= 6
    assert len([path for path in GRPO.iterdir() if (path / "__init__.py").is_file()]) <= 17


def test_every_room_says_what_enters_and_what_leaves():
    for folder in (path.parent for path in GRPO.glob("*/__init__.py")):
        text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))) or ""
        assert "In:" in text and "Out:" in text, folder.name


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(GRPO).as_posix())
def test_imports_go_down(path):
    """So there is no circle between rooms: a circle has an import that goes up, or stays on a floor."""
    room = room_of(path)
    if room == "__init__":
        assert imported_rooms(path.read_text(encoding="utf-8")) == set()
        return
    allowed = {lower for lower, number in FLOOR_OF.items() if number < FLOOR_OF[room]} | {room}
    assert imported_rooms(path.read_text(encoding="utf-8")) - allowed == set()


def test_relative_imports_are_not_used():
    """They would escape the test above."""
    for path in SOURCES:
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        assert not any(isinstance(node, ast.ImportFrom) and node.level for node in nodes), path
