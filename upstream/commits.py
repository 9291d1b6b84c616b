#   Copyright 2026 - present The PyMC Developers
#
#   Licensed under the Apache License, Version 2.0 (the "License");
#   you may not use this file except in compliance with the License.
#   You may obtain a copy of the License at
#
#       http://www.apache.org/licenses/LICENSE-2.0
#
#   Unless required by applicable law or agreed to in writing, software
#   distributed under the License is distributed on an "AS IS" BASIS,
#   WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
#   See the License for the specific language governing permissions and
#   limitations under the License.
"""Our files at the paths they have in PyMC, in commits that can be reviewed one after another.

A commit names the modules that it is about, and brings all that they import.  A test comes with
the first commit that has what it needs, and ``pymc/variational/streaming.py``, the door, grows
with the rooms behind it.
"""

import ast
import re

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from upstream.door import (
    DOOR,
    ROOMS,
    names_from,
    open_door,
    rooms_imported_by,
    rooms_of_dataset,
    without_functions,
)
from upstream.edits import DOCS, HOOK, PACKAGING, Edit, edited, list_tests

__all__ = ["COMMITS", "LEFT_OUT", "PACKAGE", "Commit", "changes", "ours"]

ROOT = Path(__file__).parents[1]
ADDED = ROOT / "upstream" / "files"
"""Files that only the merged tree has."""
PATCHED = ROOT / "upstream" / "patched"
"""Files that optional changes bring."""
PAGES = "docs/source"
STREAMING = "tests/variational/test_streaming.py"
PACKAGE = "tests/variational/__init__.py"
"""PyMC may have it."""

LEFT_OUT = {
    "tests/__init__.py, tests/conftest.py": "they test a checkout that lies beside PyMC",
    "tests/orderbook, tests/upstream, tests/test_*.py": "they test what is not merged",
    "benchmarks": "of this repository; memory.py, which tests import, is laid in",
    "docs/source/conf.py, docs/source/_static": "PyMC has its own",
    "three tests in test_streaming.py": "of fits without a callback, which work in PyMC",
}
"""What stays outside PyMC's tree, and why."""

WITHOUT_HOOK = (
    "test_a_fit_without_the_callback_fails_at_once",
    "test_another_stream_whose_callback_is_missing",
    "test_a_second_fit_without_the_callback_fails_too",
)


@dataclass(frozen=True, slots=True)
class Commit:
    """One step of the review."""

    message: str
    about: tuple[str, ...] = ()
    """Modules of ``_streaming``."""
    dataset: bool = False
    """Whether it brings ``StreamingDataset`` itself, and the modules that it uses."""
    edits: tuple[Edit, ...] = ()
    files: tuple[str, ...] = ()
    """Of ``upstream/patched``."""


COMMITS = (
    Commit(
        "Stream rows from Parquet, Arrow and arrays through a bounded shuffle",
        about=("arrow", "parquet", "shuffle"),
        edits=tuple(PACKAGING),
    ),
    Commit("Check whether the windows of a stream are exchangeable", about=("order",)),
    Commit(
        "Feed minibatches from a stream to pm.fit, and refuse models that would go wrong",
        dataset=True,
    ),
    Commit("Shuffle tables on disk, exactly and in bounded memory", about=("preshuffle", "cli")),
    Commit(
        "Check fits against all rows, and average them over whole epochs",
        about=("average", "fit_check", "fit_report"),
    ),
    Commit("Save fits on streams, so that they survive a kill", about=("checkpoint",)),
    Commit(
        "Attach the callbacks of streams in Inference.fit, and document streaming",
        about=("hook",),
        edits=(*HOOK, *DOCS),
    ),
)


def changes(commits: Sequence[Commit], files: dict[str, str]) -> dict[str, bytes]:
    """Return all files that differ after *commits*, by path.

    Parameters
    ----------
    commits : sequence of Commit
        From the first on.
    files : dict of str
        PyMC's own files that edits are for, text by path.
    """
    laid_in = ours(commits)
    tests = [path for path in laid_in if re.search(r"/test_\w+\.py$", path)]
    edits = [edit for commit in commits for edit in commit.edits]
    own = {edit.path: laid_in[edit.path].decode() for edit in edits if edit.path in laid_in}
    text = edited([*edits, list_tests(tests)], files | own)
    return laid_in | {path: new.encode() for path, new in text.items()}


def ours(commits: Sequence[Commit]) -> dict[str, bytes]:
    """Return our files after *commits*, before any edit, by path in PyMC.

    Raises
    ------
    ValueError
        If all commits together leave a module out.
    """
    dataset = any(commit.dataset for commit in commits)
    about = {name for commit in commits for name in commit.about}
    rooms = _closure(about | rooms_of_dataset(_read(DOOR)) if dataset else about)
    door = open_door(_read(DOOR), rooms, dataset=dataset)
    offered = rooms | names_from(door)
    files = {f"{ROOMS}/{name}.py": _read(f"{ROOMS}/{name}.py") for name in rooms}
    files[f"{ROOMS}/__init__.py"] = _read(f"{ROOMS}/__init__.py")
    files[DOOR] = door
    for path in _paths("tests/variational/*.py"):
        if _needs(path) <= offered:
            files[path] = _move_pages(_read(path))
    files["benchmarks/memory.py"] = _read("benchmarks/memory.py")
    if "hook" in rooms:
        files[STREAMING] = without_functions(files[STREAMING], WITHOUT_HOOK)
    everything = set(COMMITS) <= set(commits)
    if everything and (forgotten := set(_rooms()) - rooms):
        raise ValueError(f"no commit is about {sorted(forgotten)} or needs it; add it to one")
    named = set(re.findall(r"\w+\.md", "".join(files.values())))
    pages = {path: b for path, b in _pages().items() if everything or Path(path).name in named}
    files |= {path: (PATCHED / path).read_text() for commit in commits for path in commit.files}
    return {path: text.encode() for path, text in sorted(files.items())} | pages


def _closure(names: Iterable[str]) -> set[str]:
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += rooms_imported_by(_read(f"{ROOMS}/{name}.py"))
    return found


@cache
def _needs(path: str) -> frozenset[str]:
    """Return the modules of ``_streaming`` and the names of the door that a test needs."""
    text = _read(path)
    needs = rooms_imported_by(text) | {
        alias.name
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.ImportFrom) and node.module == "pymc.variational.streaming"
        for alias in node.names
    }
    # Child processes are started by name, so imports alone do not tell.
    helpers = set(re.findall(r"tests\.variational\.(\w+)", text))
    helpers |= set(re.findall(r"from tests\.variational import (\w+)", text))
    helpers -= {Path(path).stem}
    return frozenset(needs).union(*(_needs(f"tests/variational/{name}.py") for name in helpers))


def _rooms() -> list[str]:
    return [Path(path).stem for path in _paths(f"{ROOMS}/*.py") if "__init__" not in path]


def _pages() -> dict[str, bytes]:
    """Return the documentation, in a folder of its own, with the numbers that it links."""
    pages = [path for path in sorted((ROOT / PAGES).rglob("*")) if path.is_file()]
    text = "".join(path.read_text() for path in pages if path.suffix == ".md")
    pages = [path for path in pages if path.suffix != ".json" or f"/{path.name})" in text]
    return {
        f"{PAGES}/streaming/{path.relative_to(ROOT / PAGES)}": path.read_bytes()
        for path in pages
        if path.name != "conf.py" and "_static" not in path.parts
    }


def _move_pages(test: str) -> str:
    """Let a test of code in a page find the page."""
    return test.replace(PAGES, f"{PAGES}/streaming").replace(
        '"docs" / "source"', '"docs" / "source" / "streaming"'
    )


def _paths(pattern: str) -> list[str]:
    found = {p.relative_to(base) for base in (ROOT, ADDED) for p in base.glob(pattern)}
    return sorted(str(path) for path in found)


@cache
def _read(path: str) -> str:
    return next(base / path for base in (ADDED, ROOT) if (base / path).exists()).read_text()
