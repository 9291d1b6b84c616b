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
"""The commits of the branch: whole files of one subpackage, with their tests and pages.

Only two files depend on the commit: the façade imports the names whose modules are there, and the
list of test files in PyMC's workflow grows.
"""

import re

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from upstream.edits import DOCS, HOOK, PACKAGING, RANDOM_STEPS, Edit, edited, list_tests

__all__ = [
    "COMMITS",
    "FACADE",
    "FOLDERS",
    "Commit",
    "changes",
    "place_files",
    "read",
    "trim_facade",
]

ROOT = Path(__file__).parents[1]
FOLDERS = (ROOT / "upstream" / "files", ROOT)
"""Where files are looked for; those of the first exist only in PyMC's tree."""
FACADE = "pymc/variational/streaming.py"
MODULES = "pymc/variational/_streaming"
TESTS = "tests/variational/streaming"
PAGES = "docs/source/streaming"
IMPORT = re.compile(
    r"^ *from (?P<module>(?:pymc\.variational|tests|benchmarks)\b[\w.]*) import "
    r"(?P<names>\([^)]*\)|.*)\n",
    flags=re.MULTILINE,
)

MERGED = ("pymc/**/*.py", "tests/variational/**/*.py", f"{PAGES}/**/*")
NOT_MERGED = ("tests/variational/__init__.py",)
"""Files among these that PyMC has."""


@dataclass(frozen=True, slots=True)
class Commit:
    """One step of the review."""

    message: str
    files: tuple[str, ...]
    """Paths here, and patterns of paths; a path goes before a pattern of another commit."""
    edits: tuple[Edit, ...] = ()


def _subpackage(name: str, *pages: str) -> tuple[str, ...]:
    code = (f"{MODULES}/{name}/**/*.py", f"{TESTS}/{name}/**/*.py")
    return code + tuple(f"{PAGES}/{page}.md" for page in pages)


COMMITS = (
    Commit(
        "Let shared variables of a model offer callbacks to Inference.fit",
        ("pymc/variational/stream_callbacks.py", "tests/variational/test_stream_callbacks.py"),
        HOOK,
    ),
    Commit(
        "Draw anew in every step of a fit without the loss\n\n"
        "compile() looked for random generators in the outputs alone. With score=False the step\n"
        "function has none, so that each step repeated one draw: a ~ Normal(3, 2) got an sd of 22.",
        ("tests/variational/test_random_steps.py",),
        RANDOM_STEPS,
    ),
    Commit(
        "Read rows of arrays, Arrow and Parquet in blocks",
        (
            FACADE,
            f"{MODULES}/__init__.py",
            f"{MODULES}/errors.py",
            f"{TESTS}/__init__.py",
            f"{TESTS}/strategies.py",
            "benchmarks/memory.py",
            *_subpackage("sources", "sources", "object_stores"),
        ),
        PACKAGING,
    ),
    Commit("Shuffle rows in a bounded window, and read ahead of it", _subpackage("batches")),
    Commit("Check whether the windows of a stream are exchangeable", _subpackage("order", "order")),
    Commit(
        "Feed minibatches from a stream to pm.fit, and refuse models that would go wrong",
        (f"{MODULES}/*.py", f"{TESTS}/*.py", f"{PAGES}/models.md"),
    ),
    Commit(
        "Check fits against all rows, and average them over whole epochs",
        _subpackage("fit", "averaging", "fit_check"),
    ),
    Commit(
        "Shuffle tables on disk, exactly and in bounded memory",
        _subpackage("preshuffle", "preshuffle"),
    ),
    Commit(
        "Save fits on streams, so that they survive a kill",
        (
            f"{MODULES}/fit/resume.py",
            f"{TESTS}/fit/test_resume.py",
            f"{TESTS}/fit/killed_fit.py",
            f"{PAGES}/resume.md",
        ),
    ),
    Commit("Document streaming", (f"{PAGES}/**/*",), DOCS),
)


def place_files(commits: Sequence[Commit] = COMMITS) -> dict[str, int]:
    """Return the number of the commit that brings a file, by its path here.

    A test comes later than its commit says if something that it imports does.

    Raises
    ------
    ValueError
        If no commit brings a file that is to be merged, or a module imports a later one.
    """
    placed: dict[str, int] = {}
    for pattern in (True, False):
        for number, commit in enumerate(commits):
            paths = [path for path in commit.files if ("*" in path) is pattern]
            placed |= dict.fromkeys(_find(paths), number)
    if forgotten := _find(MERGED) - _find(NOT_MERGED) - placed.keys():
        raise ValueError(f"no commit brings {sorted(forgotten)}; add them to one")
    placed = {path: placed[path] for path in placed.keys() - _find(NOT_MERGED)}
    needs = {path: _needs(path, placed) for path in placed}
    for _ in commits:  # A helper of a helper may be moved, too.
        for path in placed:
            latest = max((placed[need] for need in needs[path]), default=0)
            if latest > placed[path] and path.startswith("pymc/") and path != FACADE:
                late = sorted(need for need in needs[path] if placed[need] > placed[path])
                raise ValueError(f"{path} imports {late}, which come with later commits")
            if path.startswith("tests/"):
                placed[path] = max(placed[path], latest)
    return placed


def changes(number: int, checkout: Path) -> dict[str, bytes]:
    """Return the content of the files that a commit changes, by path.

    Parameters
    ----------
    number : int
        Index of the commit.
    checkout : Path
        Folder of PyMC as the commits before left it; edits of files that are not there are left
        out.
    """
    placed = place_files()
    there = [path for path in placed if placed[path] <= number]
    new = [path for path in there if placed[path] == number]
    files = {path: read(path) for path in new}
    if taken := sorted(path for path in files if (checkout / path).exists()):
        raise ValueError(f"PyMC in {checkout} has {taken} already; start from the release")
    if FACADE in there:
        files[FACADE] = trim_facade(read(FACADE).decode(), there).encode()
    edits = [*COMMITS[number].edits, *list_tests(path for path in new if "/test_" in path)]
    for path in {edit.path for edit in edits}:
        if (checkout / path).exists():
            text = (checkout / path).read_text()
            files[path] = edited(text, [edit for edit in edits if edit.path == path]).encode()
    return files


def trim_facade(text: str, there: Iterable[str]) -> str:
    """Return the façade with names of those modules alone that are *there*, by path."""
    modules = {path.removesuffix(".py").replace("/", ".") for path in there}
    text = IMPORT.sub(lambda line: line[0] if line["module"] in modules else "", text)
    names = {name for line in IMPORT.finditer(text) for name in _words(line["names"])}
    text = re.sub(r' {4}"(\w+)",\n', lambda item: item[0] if item[1] in names else "", text)
    if "main" not in names:
        text = text.partition("\nif __name__")[0].replace("import sys\n\n", "")
    return text


def read(path: str) -> bytes:
    """Return the content of a file of ours."""
    return next(base / path for base in FOLDERS if (base / path).exists()).read_bytes()


def _find(patterns: Iterable[str]) -> set[str]:
    found = (base.glob(pattern) for base in FOLDERS for pattern in patterns)
    paths = (path for paths in found for path in paths if path.is_file())
    return {str(path.relative_to(_base(path))) for path in paths if "__pycache__" not in path.parts}


def _base(path: Path) -> Path:
    return next(base for base in FOLDERS if path.is_relative_to(base))


def _needs(path: str, known: Iterable[str]) -> set[str]:
    """Return the files among the *known* ones that a file imports, or starts by name."""
    if not path.endswith(".py"):
        return set()
    text = read(path).decode()
    names = set(re.findall(r"\btests\.variational[\w.]*", text))
    for line in IMPORT.finditer(text):
        names |= {line["module"], *(f"{line['module']}.{n}" for n in _words(line["names"]))}
    paths = {PUBLIC.get(name, name).replace(".", "/") + ".py" for name in names}
    return paths & set(known) - {path, FACADE}


def _words(names: str) -> list[str]:
    return re.findall(r"\w+", names)


PUBLIC = {
    f"pymc.variational.streaming.{name}": line["module"]
    for line in IMPORT.finditer(read(FACADE).decode())
    for name in _words(line["names"])
}
"""Module of each name of the façade."""
