"""Modules beside a reward file: `import helpers` in my/rewards.py finds my/helpers.py, as it does in a script.

`texts_beside` reads them in the trainer, when the run starts. `Neighbours` imports them from those texts, in a worker,
while the file is imported and while its functions are called, and hides them in between: files in two folders may each
have a helpers.py. What is imported under a name made at run time is found too, but read when it is imported.
"""

import ast
import contextlib
import importlib.abc
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from grpo.rewards.functions import TextLoader

NOT_BESIDE = {"grpo", *sys.stdlib_module_names}  # names that always mean these, wherever the file is
MAX_CHARACTERS = 2**22  # of one file's neighbours; the rest is read when it is imported


def texts_beside(path: Path, text: str, read: Callable[[Path], str]) -> dict[str, list[str]]:
    """Module name -> [path, text], for what a file imports from its own folder, and what that imports from there.

    Of a package all files. `read` gives a file's text; what it raises for them is left to the import.
    """
    found: dict[str, list[str]] = {}
    waiting = [text]
    while waiting and sum(len(one) for _, one in found.values()) < MAX_CHARACTERS:
        for name in sorted(_imported(waiting.pop()) - NOT_BESIDE):
            if name in found:
                continue
            for module, file in _files(path.parent, name):
                with contextlib.suppress(Exception):
                    found[module] = [str(file), read(file)]
                    waiting.append(found[module][1])
    return found


def _imported(text: str) -> set[str]:
    """First names of the modules that import statements name, wherever they stand; relative imports have none."""
    try:
        nodes = list(ast.walk(ast.parse(text)))
    except (SyntaxError, ValueError, RecursionError):  # the import will say so
        return set()
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level and node.module]
    return {name.partition(".")[0] for name in names}


def _files(folder: Path, name: str) -> list[tuple[str, Path]]:
    """The modules of that name in the folder: a package's files, or one file."""
    package = folder / name
    if (package / "__init__.py").is_file():
        files = sorted(package.rglob("*.py"))
        parts = [(name, *file.relative_to(package).with_suffix("").parts) for file in files]
        return [(".".join(p[:-1] if p[-1] == "__init__" else p), f) for p, f in zip(parts, files, strict=True)]
    file = folder / f"{name}.py"
    return [(name, file)] if file.is_file() else []


class Neighbours(importlib.abc.MetaPathFinder):
    """The modules beside one reward file, importable while `visible`."""

    def __init__(self, path: str, module: str, texts: dict[str, list[str]]):
        """module: the name of the reward file's own module, which stays visible."""
        self.folder, self.own, self.texts = os.path.join(os.path.dirname(path), ""), module, texts
        self.modules: dict[str, ModuleType] = {}  # imported so far

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """The module, if its text was read."""
        if fullname not in self.texts:
            return None
        return importlib.util.spec_from_file_location(fullname, self.texts[fullname][0], loader=self.loader(fullname))

    def loader(self, fullname: str) -> TextLoader:
        """Imports it from its text."""
        return TextLoader(*self.texts[fullname])

    @contextlib.contextmanager
    def visible(self) -> Iterator[None]:
        """Imports find the modules; other files' modules of the same names come back afterwards."""
        hidden = {name: sys.modules.pop(name) for name in {*self.texts, *self.modules} if name in sys.modules}
        size = len(sys.modules)
        sys.modules.update(self.modules)
        sys.meta_path.insert(0, self)
        sys.path.insert(0, self.folder)
        try:
            yield
        finally:
            with contextlib.suppress(ValueError):  # the user's code may have removed them
                sys.meta_path.remove(self)
                sys.path.remove(self.folder)
            for name in list(sys.modules)[size:] if len(sys.modules) > size else ():  # imported since, in that order
                if name != self.own and str(getattr(sys.modules[name], "__file__", "")).startswith(self.folder):
                    self.modules[name] = sys.modules.pop(name)
            sys.modules.update(hidden)
