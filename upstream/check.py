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
"""Run PyMC's own gates on every commit of the branch that ``upstream.assemble`` makes.

    python -m upstream.check -- -n auto               # of the release
    python -m upstream.check --checkout ../pymc       # of a copy of a git checkout

Arguments after ``--`` go to pytest.  The source distribution lacks PyMC's scripts, workflow and
pages; the gates that need one of them run where it is there.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig

from collections.abc import Iterable
from pathlib import Path

from upstream.assemble import OUTPUT, git, make_branch, missing, released, sign
from upstream.commits import COMMITS

RUFF, MYPY = "0.11.13", "1.19.1"
"""Versions that PyMC pins, for where its own settings are not there."""
PAGES = "jupyter-sphinx myst-nb numpydoc pymc-sphinx-theme sphinx-copybutton sphinx-design "
PAGES += "sphinx-notfound-page sphinx-remove-toctrees sphinx-sitemap sphinxext-rediraffe ipython"
BIN = OUTPUT / "venv" / "bin"

BARE = """
import sys, pytest
from importlib.machinery import PathFinder

OPTIONAL = "dask distributed fsspec hypothesis matplotlib psutil pyarrow".split()

class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        hidden = name.partition(".")[0] in OPTIONAL
        return None if hidden else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Finder
sys.exit(pytest.main(["-q", "--disable-plugin-autoload", *sys.argv[1:]]))
"""
"""A run of pytest in which some libraries are not there."""

OURS = (
    "tests/variational/test_random_steps.py",
    "tests/variational/test_stream_callbacks.py",
    "tests/variational/streaming/test_hook.py",
)
"""Tests of what depends on PyMC's own files; `make test` runs the others beside PyMC."""
NEAR = "initial_point math model_graph printing pytensorf root_namespace util".split()
"""PyMC's tests near to what changes."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Run PyMC's gates on the branch.")
    parser.add_argument("--checkout", type=Path, help="git checkout of PyMC; default: the release")
    parser.add_argument("--quick", action="store_true", help="leave most tests out")
    parser.add_argument("pytest", nargs="*", help="arguments for the tests of streaming")
    chosen = parser.parse_args()
    tree = released() if chosen.checkout is None else copy(chosen.checkout)
    make_branch(tree)
    for path in missing(tree):
        say(f"left out: edits of {path}, which is not there")
    make_environment(tree)
    for number, commit in enumerate(COMMITS, 1):
        say(f"\n{number}. {commit.message.splitlines()[0]}")
        git(tree, "switch", "--quiet", "--detach", f"streaming~{len(COMMITS) - number}")
        check_commit(tree, chosen.quick, chosen.pytest)
    say("\nThe whole branch")
    if chosen.quick:
        check_types(tree)
        run(tree, "python", "-m", "pytest", "-q", "--collect-only", "tests/variational", quiet=True)
        run_tests(tree, OURS, *chosen.pytest)
    near = [f"tests/test_{name}.py" for name in (NEAR[:1] if chosen.quick else NEAR)]
    run(tree, "python", "-c", BARE, *near, "tests/variational")
    check_pages(tree)


def copy(checkout: Path) -> Path:
    """Return a clone of somebody's checkout, which is left alone."""
    clone = OUTPUT / "checkout"
    shutil.rmtree(clone, ignore_errors=True)
    git(checkout, "clone", "--quiet", ".", str(clone))
    sign(clone)
    return clone


def make_environment(tree: Path) -> None:
    """Make an environment that has PyMC's tools and sees the packages of this one."""
    run(OUTPUT, sys.executable, "-m", "venv", "--clear", "--without-pip", str(BIN.parent))
    (site,) = BIN.parent.glob("lib/python*/site-packages")
    (site / "base.pth").write_text(sysconfig.get_path("purelib") + "\n")
    ruff = pinned(tree / ".pre-commit-config.yaml", r"ruff-pre-commit\n\s+rev: v(\S+)") or RUFF
    mypy = pinned(tree / "conda-envs/environment-dev.yml", r"- mypy=(\S+)") or MYPY
    tools = [f"ruff=={ruff}", f"mypy=={mypy}", "types-cachetools", "pyyaml"]
    if (tree / "docs/source/conf.py").exists():
        tools += PAGES.split()
    pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
    run(OUTPUT, *pip, "--python", str(BIN / "python"), "install", *tools)


def pinned(settings: Path, pattern: str) -> str | None:
    """Return the version that a file of PyMC's pins, if it is there."""
    found = re.search(pattern, settings.read_text()) if settings.exists() else None
    return found[1] if found else None


def check_commit(tree: Path, quick: bool, arguments: list[str]) -> None:
    files = git(tree, "diff", "--name-only", "--diff-filter=d", "HEAD~1").split()
    code = [path for path in files if path.endswith(".py")]
    tests = [path for path in code if "/test_" in path]
    if code:
        run(tree, "ruff", "check", "--no-cache", "--quiet", *code)
        run(tree, "ruff", "format", "--check", "--no-cache", "--quiet", *code)
    if (tree / "scripts/check_all_tests_are_covered.py").exists():
        run(tree, "python", "scripts/check_all_tests_are_covered.py", quiet=True)
        conda = "conda-envs/environment-dev.yml"
        run(tree, "python", "scripts/generate_pip_deps_from_conda.py", conda)
        run(tree, "git", "diff", "--exit-code")
    if not quick:
        check_types(tree)
        run_tests(tree, tests, *arguments)


def check_types(tree: Path) -> None:
    """Run mypy as PyMC does, and complain of files of ours; others depend on what is installed."""
    there = (tree / "scripts/run_mypy.py").exists()
    command = ("python", "scripts/run_mypy.py") if there else ("mypy", "pymc/variational")
    found = run(tree, *command, quiet=True, worst=1)
    if faults := re.findall(r"^pymc/variational/_?stream.*:.*", found, flags=re.MULTILINE):
        sys.exit("\n".join(faults))


def check_pages(tree: Path) -> None:
    """Build our pages with PyMC's settings; those of others, and links to other sites, are left."""
    if (tree / "docs/source/conf.py").exists():
        log = OUTPUT / "sphinx.log"
        sphinx = ("python", "-m", "sphinx", "--quiet", "--warning-file", str(log))
        only = ("-D", "exclude_patterns=contributing,guides,learn,api/[!v]*")
        # Redirects to pages that are left out end in 1.
        run(tree, *sphinx, *only, "docs/source", str(OUTPUT / "pages"), quiet=True, worst=1)
        ours = [line for line in log.read_text().splitlines() if "streaming" in line]
        if faults := [line for line in ours if "'python:" not in line]:
            sys.exit("\n".join(faults))


def run_tests(tree: Path, tests: Iterable[str], *arguments: str) -> None:
    if there := [path for path in tests if (tree / path).exists()]:
        run(tree, "python", "-m", "pytest", "-q", "-W", "error", *arguments, *there)


def run(folder: Path, *command: str, quiet: bool = False, worst: int = 0) -> str:
    """Run a command with PyMC's tree before the PyMC that is installed, and return its output.

    Without *quiet* the output is shown instead.  A code above *worst* ends the run.
    """
    say(f"$ {' '.join(command).splitlines()[0]}"[:100])
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(folder)}
    program = shutil.which(command[0], path=path) or command[0]
    command = (program, *command[1:])
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=quiet, text=True)
    if not 0 <= done.returncode <= worst:
        sys.exit(f"{done.stdout or ''}{done.stderr or ''}failed with {done.returncode}")
    return done.stdout or ""


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
