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
"""The changes to PyTensor that are proposed beside the branch change no number."""

import json
import os
import shutil
import subprocess
import sys

from pathlib import Path

import pytensor
import pytest

PATCHES = sorted((Path(__file__).parents[2] / "upstream" / "pytensor").glob("*.patch"))
WRITTEN_FOR = "3.3.8"  # all of them apply to this version of PyTensor

STEPS = """
import json
import numpy as np, pytensor, pytensor.tensor as pt
from pytensor.compile.sharedvalue import shared
rows, mean = shared(np.random.default_rng(0).normal(1, 2, (500, 2))), shared(np.zeros(2))
generator = shared(np.random.default_rng(1))
next_generator, noise = pt.random.normal(size=2, rng=generator).owner.outputs
loss = ((rows - mean - noise) ** 2).sum()
updates = {mean: mean - 1e-4 * pytensor.grad(loss, mean), generator: next_generator}
step = pytensor.function([], loss, updates=updates, mode="NUMBA")
losses = [float(step()) for _ in range(100)]
print(json.dumps([pytensor.__file__, losses, mean.get_value().tolist()]))
"""
"""Steps as those of a fit: a random draw, a gradient, and shared variables that are updated."""


def run_steps(path: Path) -> tuple[str, list]:
    """Make steps in a process that finds modules in *path* first."""
    flags = {"PYTHONPATH": str(path), "PYTENSOR_FLAGS": f"base_compiledir={path / 'compiled'}"}
    command = [sys.executable, "-c", STEPS]
    done = subprocess.run(command, env=os.environ | flags, cwd=path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    file, *numbers = json.loads(done.stdout.splitlines()[-1])
    return file, numbers


def test_the_changes_to_pytensor_change_no_number(tmp_path):
    changed, unchanged = tmp_path / "changed", tmp_path / "unchanged"
    shutil.copytree(Path(pytensor.__file__).parent, changed / "pytensor")
    unchanged.mkdir()
    for patch in PATCHES:
        if subprocess.run(["git", "apply", str(patch)], cwd=changed).returncode:
            assert pytensor.__version__ != WRITTEN_FOR
            pytest.skip(f"PyTensor {pytensor.__version__} has other code there")
    file, found = run_steps(changed)
    assert Path(file).is_relative_to(changed)
    assert found == run_steps(unchanged)[1]
