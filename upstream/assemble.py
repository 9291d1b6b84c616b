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

    python -m upstream.assemble                      # of the released source distribution
    python -m upstream.assemble --checkout ../pymc   # of a git checkout

The first downloads the release that the edits were written for, and makes a repository of it in
``build/upstream``.  It lacks some of the files that are edited; those edits are left out.
"""

import argparse
import hashlib
import shutil
import subprocess
import sys
import tarfile

from pathlib import Path

from upstream.commits import COMMITS, changes
from upstream.edits import list_tests

__all__ = ["git", "make_branch", "missing", "released", "sign"]

VERSION = "6.4.0"
SHA256 = "319348878ec698b6cc406320456b2bc00d80bea9bfb72b6ab02b2ce6b179e3b5"
OUTPUT = Path(__file__).parents[1] / "build" / "upstream"
PACKAGES = ("tests/__init__.py", "tests/variational/__init__.py")
"""Files that the source distribution lacks."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Make a branch of PyMC with streaming in it.")
    parser.add_argument("--checkout", type=Path, help="git checkout of PyMC; default: the release")
    parser.add_argument("--branch", default="streaming", help="its name; default: streaming")
    chosen = parser.parse_args()
    checkout = chosen.checkout or released()
    make_branch(checkout, chosen.branch)
    sys.stdout.write(f"made the branch {chosen.branch!r} in {checkout}\n")
    for path in missing(checkout):
        sys.stdout.write(f"left out: edits of {path}, which is not there\n")


def released(output: Path = OUTPUT) -> Path:
    """Return a new git repository of the released source distribution."""
    sdist, checkout = output / f"pymc-{VERSION}.tar.gz", output / f"pymc-{VERSION}"
    if not sdist.exists():
        command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
        command += ["download", "--no-deps", "--no-binary", "pymc", f"pymc=={VERSION}"]
        subprocess.run([*command, "--dest", str(output)], check=True)
    if (found := hashlib.sha256(sdist.read_bytes()).hexdigest()) != SHA256:
        raise ValueError(f"{sdist} has the SHA-256 {found}, not {SHA256}; delete it")
    shutil.rmtree(checkout, ignore_errors=True)
    with tarfile.open(sdist) as archive:
        archive.extractall(output, filter="data")
    _write(checkout, dict.fromkeys(PACKAGES, b""))
    git(checkout, "init", "--quiet", "--initial-branch=main")
    sign(checkout)
    git(checkout, "add", ".")
    git(checkout, "commit", "--quiet", f"--message=PyMC {VERSION}")
    return checkout


def make_branch(checkout: Path, branch: str = "streaming") -> None:
    """Make a branch with one commit for each of `COMMITS`, and leave it checked out."""
    if git(checkout, "status", "--porcelain"):
        raise ValueError(f"{checkout} has changes; commit or stash them first")
    git(checkout, "switch", "--quiet", "--create", branch)
    try:
        for number, commit in enumerate(COMMITS):
            files = changes(number, checkout)
            _write(checkout, files)
            git(checkout, "add", "--force", "--", *files)
            git(checkout, "commit", "--quiet", "--message", commit.message)
    except ValueError:
        git(checkout, "checkout", "--quiet", "-")
        git(checkout, "branch", "--quiet", "-D", branch)
        raise


def sign(checkout: Path) -> None:
    """Name an author of commits in a repository that is nobody's."""
    git(checkout, "config", "user.name", "PyMC streaming")
    git(checkout, "config", "user.email", "streaming@localhost")


def missing(checkout: Path) -> list[str]:
    """Return the paths of PyMC's own files that are edited and not there."""
    edits = [edit for commit in COMMITS for edit in commit.edits] + list_tests(["any"])
    paths = dict.fromkeys(edit.path for edit in edits)
    return [path for path in paths if not (checkout / path).exists()]


def git(checkout: Path, *arguments: str) -> str:
    """Run git in a folder and return what it prints."""
    command = ["git", "-C", str(checkout), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"git {' '.join(arguments[:2])}: {done.stderr.strip()}")
    return done.stdout


def _write(checkout: Path, files: dict[str, bytes]) -> None:
    for path, content in files.items():
        (checkout / path).parent.mkdir(parents=True, exist_ok=True)
        (checkout / path).write_bytes(content)


if __name__ == "__main__":
    main()
