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
"""Make a branch of PyMC with streaming in it, one commit for each step of the review.

    python -m upstream.assemble             # of the released source distribution
    python -m upstream.assemble ../pymc     # of a clone of a git checkout

The branch is called ``streaming``, and its repository is ``build/upstream/pymc``.
"""

import re
import shutil
import subprocess
import sys
import tarfile

from collections.abc import Iterable
from pathlib import Path

from upstream.commits import COMMITS, FACADE, FIRST_TEST, WORKFLOW, Edit

__all__ = ["OUTPUT", "ROOT", "edited", "git", "imported", "make_branch", "place_files", "read"]

ROOT = Path(__file__).parents[1]
OUTPUT = ROOT / "build" / "upstream"
FOLDERS = (ROOT / "upstream" / "files", ROOT)
"""Folders of the files; those in the first exist only in PyMC's tree."""
RELEASE = "pymc-6.4.0"
NAME = re.compile(r"\w+")
PAGE = re.compile(r"docs/source/streaming/\w+\.md")
IMPORT = re.compile(r"^ *from (?P<module>[\w.]+) import (?P<names>\([^)]*\)|.*)\n", re.MULTILINE)


def make_branch(checkout: Path | None = None, output: Path = OUTPUT) -> Path:
    """Return a new repository in which the branch is checked out."""
    tree = output / "pymc"
    shutil.rmtree(tree, ignore_errors=True)
    if checkout is None:
        _unpack_release(tree)
    else:
        git(checkout, "clone", "--quiet", ".", str(tree))
    git(tree, "switch", "--quiet", "--create", "streaming")
    placed = place_files()
    for number, commit in enumerate(COMMITS):
        new = sorted(path for path, place in placed.items() if place == number)
        for path in new:
            (tree / path).parent.mkdir(parents=True, exist_ok=True)
            with (tree / path).open("xb") as file:  # It is an error if PyMC has this file.
                file.write(read(path))
        if (tree / FACADE).exists():
            (tree / FACADE).write_text(_facade(path for path in placed if placed[path] <= number))
        for edit in (*commit.edits, _list_tests(new)):
            # The source distribution lacks some files; a checkout has to have all of them.
            if checkout is not None or (tree / edit.path).exists():
                (tree / edit.path).write_text(edited((tree / edit.path).read_text(), edit))
        git(tree, "add", "--all", "--force")
        git(tree, "commit", "--quiet", "--message", commit.message)
    return tree


def edited(text: str, edit: Edit) -> str:
    """Return the *text* of a file after an edit; the anchor has to occur exactly once."""
    if (found := text.count(edit.anchor)) != 1:
        raise ValueError(f"the anchor {edit.anchor!r} occurs {found} times in {edit.path}")
    after = edit.where == "after"
    return text.replace(edit.anchor, edit.anchor + edit.text if after else edit.text + edit.anchor)


def place_files() -> dict[str, int]:
    """Return the number of the commit that brings a file, by the file's path.

    A test that imports something of a later commit comes with that commit.
    """
    patterns = [(one, number) for number, commit in enumerate(COMMITS) for one in commit.files]
    placed: dict[str, int] = {}
    for pattern, number in sorted(patterns, key=lambda pair: len(pair[0])):
        placed |= dict.fromkeys(_find(pattern), number)
    tests = {path: imported(path, placed) for path in placed if path.startswith("tests/")}
    for _ in COMMITS:  # What a test imports may itself come later than its pattern says.
        for path, needs in tests.items():
            placed[path] = max(placed[path], *(placed[need] for need in needs), 0)
    return placed


def imported(path: str, paths: Iterable[str]) -> set[str]:
    """Return those of *paths* that a file, or a page that it names, imports or runs."""
    text = read(path).decode()
    text += "".join(read(page).decode() for page in PAGE.findall(text))
    names = set(re.findall(r"\btests\.variational[\w.]*", text))
    for line in IMPORT.finditer(text):
        names.add(line["module"])
        names |= {f"{line['module']}.{name}" for name in NAME.findall(line["names"])}
    modules = {PUBLIC.get(name, name) for name in names}
    return {other for other in paths if _module(other) in modules} - {FACADE, path}


def read(path: str) -> bytes:
    """Return the content of a file of ours."""
    return next(base / path for base in FOLDERS if (base / path).exists()).read_bytes()


def git(folder: Path, *arguments: str) -> str:
    """Run git in a folder and return what it prints."""
    done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"git {' '.join(arguments[:2])}: {done.stderr.strip()}")
    return done.stdout


def _unpack_release(tree: Path) -> None:
    """Download the release that the edits were written for, and make a repository of it."""
    tree.parent.mkdir(parents=True, exist_ok=True)
    if not (archive := tree.parent / f"{RELEASE}.tar.gz").exists():
        download = "pip --quiet download --no-deps --no-binary pymc pymc==" + RELEASE[5:]
        subprocess.run([sys.executable, "-m", *download.split()], cwd=tree.parent, check=True)
    with tarfile.open(archive) as files:
        files.extractall(tree.parent, filter="data")
    (tree.parent / RELEASE).rename(tree)
    for folder in ("tests", "tests/variational"):
        (tree / folder).mkdir(exist_ok=True)
        (tree / folder / "__init__.py").touch()
    git(tree, "init", "--quiet", "--initial-branch=main")
    for key, value in (("name", "PyMC"), ("email", "pymc@localhost")):
        git(tree, "config", f"user.{key}", value)
    git(tree, "add", ".")
    git(tree, "commit", "--quiet", f"--message={RELEASE}")


def _facade(there: Iterable[str]) -> str:
    """Return the façade with the names of those modules alone whose files are there."""
    modules = {"sys", *map(_module, there)}
    text = IMPORT.sub(lambda line: line[0] if line["module"] in modules else "", FACADE_TEXT)
    names = {name for line in IMPORT.finditer(text) for name in NAME.findall(line["names"])}
    text = re.sub(r' {4}"(\w+)",\n', lambda item: item[0] if item[1] in names else "", text)
    if "main" not in names:
        text = text.partition("\nif __name__")[0].replace("import sys\n\n", "")
    return text


def _list_tests(paths: list[str]) -> Edit:
    """Return the edit that adds the test files among *paths* to PyMC's workflow."""
    lines = [f"{' ' * 12}{path}\n" for path in paths if "/test_" in path]
    return Edit(WORKFLOW, FIRST_TEST, "".join(line for line in lines if line != FIRST_TEST))


def _find(pattern: str) -> set[str]:
    found = {path: base for base in FOLDERS for path in base.glob(pattern) if path.is_file()}
    return {str(path.relative_to(base)) for path, base in found.items()}


def _module(path: str) -> str:
    return path.removesuffix(".py").replace("/", ".")


FACADE_TEXT = read(FACADE).decode()
PUBLIC = {
    f"{_module(FACADE)}.{name}": line["module"]
    for line in IMPORT.finditer(FACADE_TEXT)
    for name in NAME.findall(line["names"])
}

if __name__ == "__main__":
    make_branch(*map(Path, sys.argv[1:]))
