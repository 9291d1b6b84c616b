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
"""``pymc/variational/streaming.py`` while rooms behind it, or the dataset itself, are to come."""

import ast
import re

from collections.abc import Iterable
from functools import cache
from typing import TypeGuard

__all__ = [
    "DOOR",
    "ROOMS",
    "names_from",
    "open_door",
    "rooms_imported_by",
    "rooms_of_dataset",
    "without_functions",
]

DOOR = "pymc/variational/streaming.py"
ROOMS = "pymc/variational/_streaming"
_PACKAGE = "pymc.variational._streaming"


def open_door(text: str, rooms: set[str], *, dataset: bool) -> str:
    """Return the door without what needs other *rooms*.

    Parameters
    ----------
    text : str
        The whole module.
    rooms : set of str
        Modules of ``_streaming`` that are there.
    dataset : bool
        Whether ``StreamingDataset`` is there; without it, the door only passes names on.
    """
    _, *nodes = ast.parse(text).body
    gone = {name for node in nodes if _rooms_of(node) - rooms for name in _bound(node)}
    kept = nodes
    if not dataset:
        gone.add("StreamingDataset")
        kept = [node for node in nodes if _bound(node) or _is_all(node)]
    kept = [node for node in kept if not (isinstance(node, ast.If) and _used(node) & gone)]
    used = {name for node in kept for name in _used(node)} - gone
    lines = text.splitlines(keepends=True)
    for node in reversed(nodes):
        first = min(n.lineno for n in [node, *getattr(node, "decorator_list", [])]) - 1
        old = lines[first : node.end_lineno]
        lines[first : node.end_lineno] = _rendered(node, old, used) if node in kept else []
    left = re.sub(r"\n{4,}", "\n\n\n", "".join(lines)).rstrip("\n") + "\n"
    return re.sub(r"\n{3}(?=import |from )", "\n\n", left)


def rooms_of_dataset(text: str) -> set[str]:
    """Return the modules of ``_streaming`` that the door's own code, not its names, needs."""
    nodes = ast.parse(text).body
    code = [node for node in nodes if isinstance(node, ast.ClassDef | ast.FunctionDef)]
    used = {name for node in code for name in _used(node)}
    return {room for node in nodes if used & set(_bound(node)) for room in _rooms_of(node)}


def without_functions(text: str, names: Iterable[str]) -> str:
    """Return a module without some of its functions or methods.

    Raises
    ------
    ValueError
        If one is not there.
    """
    defined = {n.name: n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef)}
    if missing := sorted(set(names) - defined.keys()):
        raise ValueError(f"there are no functions {missing} to leave out")
    lines = text.splitlines(keepends=True)
    for node in sorted((defined[name] for name in names), key=lambda n: n.lineno, reverse=True):
        first = min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1
        after = node.end_lineno or first
        while after < len(lines) and not lines[after].strip():
            after += 1
        del lines[first:after]
    return "".join(lines)


def names_from(door: str) -> set[str]:
    """Return the public names of a door."""
    return {name for node in ast.parse(door).body if _is_all(node) for name in _used(node)}


@cache
def rooms_imported_by(text: str) -> frozenset[str]:
    """Return the modules of ``_streaming`` that a module imports when it runs."""
    found: set[str] = set()
    waiting: list[ast.AST] = [ast.parse(text)]
    while waiting:
        node = waiting.pop()
        if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)):
            found |= _rooms_of(node)
            waiting += ast.iter_child_nodes(node)
    return frozenset(found)


def _rooms_of(node: ast.AST) -> set[str]:
    if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith(_PACKAGE):
        return set()
    room = (node.module or "")[len(_PACKAGE) + 1 :]
    return {room} if room else {alias.name for alias in node.names}


def _bound(node: ast.AST) -> list[str]:
    """Return the names that an import gives."""
    if not isinstance(node, ast.Import | ast.ImportFrom):
        return []
    return [(alias.asname or alias.name).partition(".")[0] for alias in node.names]


def _is_all(node: ast.AST) -> TypeGuard[ast.Assign]:
    return isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"


def _used(node: ast.AST) -> set[str]:
    """Return the names that a statement uses, or lists."""
    if _is_all(node):
        return set(ast.literal_eval(node.value))
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}


def _rendered(node: ast.stmt, lines: list[str], used: set[str]) -> list[str]:
    """Return the lines of a statement, without names that nothing uses."""
    if _is_all(node):
        return [line for line in lines if '"' not in line or line.strip(' ",\n') in used]
    names = _bound(node)
    left = [name for name in names if name in used]
    if left == names:
        return lines
    if not left or not isinstance(node, ast.ImportFrom):
        return []
    return [f"from {node.module} import {', '.join(left)}\n"]
