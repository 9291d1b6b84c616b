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
"""Put streaming into PyMC's source tree.

    python -m upstream.assemble                      # into the released source distribution
    python -m upstream.assemble --checkout ../pymc   # as commits on a new branch

The first downloads the source distribution of the release that the edits were written for, checks
its hash, and leaves ``build/upstream/pymc-6.4.0`` and ``build/upstream/streaming.diff``.  The
source distribution lacks some of the files that are edited; those edits are reported as left out.
"""

import argparse
import difflib
import hashlib
import shutil
import subprocess
import sys
import tarfile

from collections.abc import Iterable, Sequence
from pathlib import Path

from upstream.commits import COMMITS, LEFT_OUT, PACKAGE, Commit, changes, ours
from upstream.edits import Edit, list_tests
from upstream.patches import PATCHES

__all__ = ["assemble_tree", "diff", "make_branch", "read_edited", "verified"]

VERSION = "6.4.0"
SDIST = f"pymc-{VERSION}.tar.gz"
SHA256 = "319348878ec698b6cc406320456b2bc00d80bea9bfb72b6ab02b2ce6b179e3b5"
OUTPUT = Path(__file__).parents[1] / "build" / "upstream"

STAND_INS = {
    "tests/__init__.py": "",
    "tests/conftest.py": """\
import numpy
import pytest


@pytest.fixture
def seeded_test():
    numpy.random.seed(0)


@pytest.fixture
def strict_float32():
    pass  # nothing to watch in float64
""",
}
"""What PyMC's tests need and the source distribution lacks."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Put streaming into PyMC's source tree.")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="default: build/upstream")
    parser.add_argument("--checkout", type=Path, help="git checkout of PyMC to make a branch in")
    parser.add_argument("--branch", default="streaming", help="its name; default: streaming")
    parser.add_argument(
        "--patch", action="append", default=[], choices=list(PATCHES), help="optional change to add"
    )
    chosen = parser.parse_args(arguments)
    commits = [*COMMITS, *(PATCHES[name] for name in chosen.patch)]
    try:
        if chosen.checkout is not None:
            left_out = make_branch(chosen.checkout, chosen.branch, commits)
        else:
            left_out = assemble_tree(verified(chosen.output / SDIST), chosen.output, commits)
    except (ValueError, OSError, subprocess.CalledProcessError) as err:
        sys.stderr.write(f"{err}\n")
        return 1
    for path in left_out:
        sys.stdout.write(f"left out: edits of {path}, which is not there\n")
    for paths, why in LEFT_OUT.items():
        sys.stdout.write(f"not laid in: {paths} ({why})\n")
    return 0


def verified(sdist: Path) -> Path:
    """Return the path of the source distribution, downloaded if need be, after a check."""
    if not sdist.exists():
        command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
        command += ["download", "--no-deps", "--no-binary", "pymc", f"pymc=={VERSION}"]
        subprocess.run([*command, "--dest", str(sdist.parent)], check=True)
    found = hashlib.sha256(sdist.read_bytes()).hexdigest()
    if found != SHA256:
        raise ValueError(f"{sdist} has the SHA-256 {found}, not {SHA256}; delete it")
    return sdist


def assemble_tree(sdist: Path, output: Path, commits: Sequence[Commit] = COMMITS) -> list[str]:
    """Unpack a source distribution below *output*, and put everything in.

    Returns
    -------
    list of str
        Files with edits that are not there.
    """
    tree = output / f"pymc-{VERSION}"
    if tree.exists():
        shutil.rmtree(tree)
    with tarfile.open(sdist) as archive:
        archive.extractall(output, filter="data")
    before, left_out = read_edited(tree, commits)
    after = changes(commits, before)
    _write(tree, after)
    _write(tree, {path: text.encode() for path, text in STAND_INS.items()})
    (output / "streaming.diff").write_text("".join(diff(before, after)))
    return left_out


def make_branch(checkout: Path, branch: str, commits: Sequence[Commit] = COMMITS) -> list[str]:
    """Make a branch with one commit for each of *commits*, and leave it checked out.

    Returns
    -------
    list of str
        Files with edits that are not there.
    """
    if _git(checkout, "status", "--porcelain"):
        raise ValueError(f"{checkout} has changes; commit or stash them first")
    if _git(checkout, "branch", "--list", branch):
        raise ValueError(f"{checkout} has a branch {branch!r}; delete it, or name another one")
    before, left_out = read_edited(checkout, commits)
    states = [changes(commits[: k + 1], before) for k in range(len(commits))]
    _git(checkout, "switch", "--quiet", "--create", branch)
    for commit, files in zip(commits, states):
        _write(checkout, files)
        _git(checkout, "add", "--", *files)
        _git(checkout, "commit", "--quiet", "--message", commit.message)
    return left_out


def read_edited(root: Path, commits: Sequence[Commit]) -> tuple[dict[str, str], list[str]]:
    """Return PyMC's own files that *commits* edit, text by path, and those that are not there."""
    edits: list[Edit] = [edit for commit in commits for edit in commit.edits]
    paths = dict.fromkeys(edit.path for edit in [*edits, list_tests([])])
    there = {path: (root / path).read_text() for path in paths if (root / path).exists()}
    new = ours(commits).keys() - {PACKAGE}
    if taken := sorted(path for path in new if (root / path).exists()):
        raise ValueError(f"PyMC in {root} has {taken} already; start from the release")
    return there, [path for path in paths if path not in there.keys() | new]


def diff(before: dict[str, str], after: dict[str, bytes]) -> Iterable[str]:
    """Yield a unified diff; of files that are no text, only the name."""
    for path, new in after.items():
        old = before.get(path)
        try:
            lines = new.decode().splitlines(keepends=True)
        except UnicodeDecodeError:
            yield f"Binary file b/{path} is new\n"
            continue
        start = "/dev/null" if old is None else f"a/{path}"
        yield from difflib.unified_diff(
            (old or "").splitlines(keepends=True), lines, start, f"b/{path}"
        )


def _write(tree: Path, files: dict[str, bytes]) -> None:
    for path, content in files.items():
        if path == PACKAGE and (tree / path).exists():
            continue
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        (tree / path).write_bytes(content)


def _git(checkout: Path, *arguments: str) -> str:
    command = ["git", "-C", str(checkout), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"{' '.join(command[:4])}: {done.stderr.strip()}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
