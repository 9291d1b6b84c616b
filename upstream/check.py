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
"""Install PyMC with streaming beside what is installed here, and test it there.

    python -m upstream.check --venv .venv-pymc -- -n auto

Arguments after ``--`` go to pytest for the tests of streaming.  The new environment sees the
packages of this one but has a PyMC of its own, which hides the one here and the wheel beside it.
"""

import argparse
import os
import re
import subprocess
import sys
import sysconfig

from pathlib import Path

from upstream.assemble import COMMITS, OUTPUT, SDIST, VERSION, assemble_tree, verified

__all__ = ["changed_files", "make_environment"]

OWN_TESTS = (
    "tests/test_data.py",
    "tests/test_initial_point.py",
    "tests/test_math.py",
    "tests/test_model_graph.py",
    "tests/test_printing.py",
    "tests/test_pytensorf.py",
    "tests/test_root_namespace.py",
    "tests/test_util.py",
)
"""PyMC's tests that its source distribution holds; test_testing.py needs one that is not there,
test_func_utils.py is about nothing that is touched and takes minutes."""

NOT_OFFLINE = "test_get_data"
QUICK_OWN = ("tests/test_initial_point.py", "tests/test_root_namespace.py")
QUICK = tuple(
    f"tests/variational/test_{name}.py"
    for name in ("average", "checkpoint", "guards", "hook", "streaming")
)
"""What depends on the hook; `make test` runs the others on stock PyMC."""

USER_CODE = Path(__file__).with_name("user_code.py")


def main() -> None:
    parser = argparse.ArgumentParser(description="Install and test PyMC with streaming.")
    parser.add_argument("--venv", type=Path, required=True, help="environment to make")
    parser.add_argument("--quick", action="store_true", help="leave most tests out")
    parser.add_argument("pytest", nargs="*", help="arguments for the tests of streaming")
    chosen = parser.parse_args()
    assemble_tree(verified(OUTPUT / SDIST), OUTPUT, COMMITS)
    own, tests = (QUICK_OWN, QUICK) if chosen.quick else (OWN_TESTS, ["tests/variational"])
    tree = OUTPUT / f"pymc-{VERSION}"
    files = changed_files(OUTPUT / "streaming.diff")
    run(tree, sys.executable, "-m", "ruff", "check", "--no-cache", *files)
    run(tree, sys.executable, "-m", "ruff", "format", "--check", "--no-cache", *files)
    python = make_environment(chosen.venv.absolute())
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    run(tree, *pip, "--python", python, "install", "--no-compile", f"{tree}[streaming]")
    pytest = [python, "-m", "pytest", "-p", "no:cacheprovider", "--color=no", "-q"]
    run(OUTPUT, *pytest, "-W", "error", "-c", os.devnull, str(USER_CODE))
    run(tree, *pytest, "-k", f"not {NOT_OFFLINE}", *own)
    run(tree, *pytest, "-W", "error", *chosen.pytest, *tests)


def changed_files(diff: Path) -> list[str]:
    return re.findall(r"^\+\+\+ b/(.*\.py)$", diff.read_text(), flags=re.MULTILINE)


def make_environment(venv: Path) -> str:
    """Make an environment that sees the packages of this one, and return its interpreter."""
    command = [sys.executable, "-m", "venv", "--clear", "--without-pip", str(venv)]
    subprocess.run(command, check=True)
    python = str(venv / "bin" / "python")
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    own = subprocess.run([python, "-c", ask], check=True, capture_output=True, text=True)
    Path(own.stdout.strip(), "base.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def run(folder: Path, *command: str) -> None:
    sys.stdout.write(f"{' '.join(command)[:200]}\n")
    sys.stdout.flush()
    done = subprocess.run(command, cwd=folder, env={**os.environ, "PYTHONPATH": ""})
    if done.returncode:
        sys.exit(done.returncode)


if __name__ == "__main__":
    main()
