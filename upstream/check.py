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
"""Run PyMC's own gates on each commit of the branch that ``upstream.assemble`` makes.

    python -m upstream.check -- -n auto                     # of the release
    python -m upstream.check --quick --checkout ../pymc     # of a clone of a git checkout

With ``--quick``, only those tests run that depend on changes of PyMC.  Arguments after ``--`` go
to the tests of streaming.  The release lacks PyMC's scripts, workflow and most of its tests.
"""

import argparse
import os
import subprocess
import sys

from pathlib import Path

from upstream.assemble import OUTPUT, git, make_branch
from upstream.commits import COMMITS

PINNED = "ruff==0.11.13 mypy==1.19.1 types-cachetools pyyaml"
"""What PyMC's pre-commit hooks and its job for mypy install."""
HOOKED = "tests/variational/streaming/test_hook.py"  # `make test` runs the others beside PyMC
NEAR = "math initial_point model_graph printing pytensorf root_namespace util".split()
"""PyMC's tests near to what changes; a quick run has the first of them."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Run PyMC's gates on the branch.")
    parser.add_argument("--checkout", type=Path, help="git checkout of PyMC; default: the release")
    parser.add_argument("--quick", action="store_true", help="leave most tests out")
    parser.add_argument("pytest", nargs="*", help="arguments for the tests of streaming")
    chosen = parser.parse_args()
    tree = make_branch(chosen.checkout)
    run(OUTPUT, f"python -m pip --quiet install --upgrade --target tools {PINNED}")
    for number, commit in enumerate(COMMITS, 1):
        sys.stdout.write(f"\n{number}. {commit.message.splitlines()[0]}\n")
        git(tree, "switch", "--quiet", "--detach", f"streaming~{len(COMMITS) - number}")
        files = git(tree, "diff", "--name-only", "HEAD~1", "--", "*.py").split()
        check_commit(tree, files)
        if not chosen.quick:
            run_tests(tree, files, *chosen.pytest)
    sys.stdout.write("\nThe whole branch\n")
    # PyMC counts notes as errors, too; without either, mypy prints one line.
    mypy = "mypy --follow-imports=silent pymc/variational/*stream* | tee -a /dev/stderr | wc -l"
    run(tree, f'test "$({mypy})" -eq 1')
    run(tree, "python -m pytest -qq --collect-only tests/variational")
    if chosen.quick:
        run_tests(tree, [HOOKED], *chosen.pytest)
    (OUTPUT / "lacking").mkdir(exist_ok=True)
    for library in ("hypothesis", "pyarrow"):
        (OUTPUT / "lacking" / f"{library}.py").write_text("raise ImportError\n")
    near = [f"tests/test_{name}.py" for name in (NEAR[:1] if chosen.quick else NEAR)]
    pytest = "python -m pytest -q -p no:hypothesispytest tests/variational "
    run(tree, pytest + " ".join(near), OUTPUT / "lacking")


def check_commit(tree: Path, files: list[str]) -> None:
    if files:
        run(tree, f"ruff check --no-cache --quiet {' '.join(files)}")
        run(tree, f"ruff format --no-cache --quiet --check {' '.join(files)}")
    if (tree / "scripts/check_all_tests_are_covered.py").exists():
        run(tree, "python scripts/check_all_tests_are_covered.py")
        run(tree, "python scripts/generate_pip_deps_from_conda.py conda-envs/environment-dev.yml")
        run(tree, "git diff --exit-code")


def run_tests(tree: Path, files: list[str], *arguments: str) -> None:
    if tests := [path for path in files if "/test_" in path]:
        run(tree, f"python -m pytest -q -W error {' '.join([*arguments, *tests])}")


def run(folder: Path, command: str, *before: Path) -> None:
    """Run a command, which finds modules in *before*, in *folder*, and last in the environment."""
    sys.stdout.write(f"$ {command[:100]}\n")
    sys.stdout.flush()
    programs = (OUTPUT / "tools" / "bin", Path(sys.executable).parent, os.environ["PATH"])
    paths = {"PATH": programs, "PYTHONPATH": (*before, folder, OUTPUT / "tools")}
    environment = {name: os.pathsep.join(map(str, value)) for name, value in paths.items()}
    if subprocess.run(command, shell=True, cwd=folder, env=os.environ | environment).returncode:
        sys.exit(f"failed: {command}")


if __name__ == "__main__":
    main()
