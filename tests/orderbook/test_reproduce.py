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
"""The experiment goes on where it was stopped, and its tables say what its numbers say."""

import json
import os
import re
import subprocess
import sys
import time

from pathlib import Path
from unittest.mock import patch

import numpy as np
import psutil
import pytest

from benchmarks.harness import in_process, run_command
from benchmarks.orderbook import reproduce
from benchmarks.orderbook.experiment import PRIOR_SD, exact_posterior
from benchmarks.orderbook.fold import fold
from benchmarks.orderbook.generate import _messages_for, generate, write_rows
from benchmarks.orderbook.reproduce import COMMAND
from tests.orderbook.wire import read_rows

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/source/evidence.md"
NUMBERS = ROOT / "docs/source/results/reproduce.json"


class Experiment:
    """Numbers instead of fits, with a note of the tables that were fitted."""

    def __init__(self, folder, monkeypatch):
        self.folder = folder
        self.fitted = []
        self.fails = None
        monkeypatch.setattr(reproduce, "in_process", self.make)
        monkeypatch.setattr(reproduce, "_results", self.results)

    def run(self, steps=1):
        self.fitted.clear()
        with patch.object(reproduce, "STEPS", steps):
            return reproduce.run(self.folder, sizes=[20_000, 10_000], billion=False)

    def make(self, write, rows):
        rows.mkdir(parents=True)

    def results(self, folder, parameters):
        assert (folder / "rows").exists()
        yield "exact", {}
        if parameters["rows"] == self.fails:
            raise KeyboardInterrupt
        self.fitted.append(parameters["rows"])
        yield "preshuffled", {"n_steps": parameters["n_steps"]}


@pytest.fixture
def experiment(tmp_path, monkeypatch):
    return Experiment(tmp_path, monkeypatch)


def test_tables_that_are_finished_are_not_fitted_again_unless_parameters_change(experiment):
    first = experiment.run()
    assert experiment.fitted == [10_000, 20_000]
    assert experiment.run() == first and not experiment.fitted
    changed = experiment.run(steps=1_000)
    assert experiment.fitted == [10_000, 20_000]
    assert changed["0.01M"]["preshuffled"]["result"] == {"n_steps": 1_000}


def test_an_interrupted_run_goes_on_with_the_table_that_was_interrupted(experiment):
    experiment.fails = 20_000
    with pytest.raises(KeyboardInterrupt):
        experiment.run()
    experiment.fails = None
    experiment.run()
    assert experiment.fitted == [20_000]
    assert not (experiment.folder / "tables").exists()


@pytest.mark.parametrize("n_rows", [5_000, 450_000], ids=["one window", "two windows"])
def test_rows_made_in_memory_are_those_of_generate_and_fold(tmp_path, n_rows):
    messages = tmp_path / "messages"
    n = _messages_for(n_rows)
    generate(messages, messages=n, seed=2, format="parquet", progressbar=False)
    fold(messages, tmp_path / "folded", progressbar=False)
    write_rows(tmp_path / "rows", rows=n_rows, seed=2)
    assert read_rows(tmp_path / "rows").equals(read_rows(tmp_path / "folded").slice(0, n_rows))


def test_a_table_begins_like_the_one_it_is_planned_as(tmp_path):
    write_rows(tmp_path / "whole", rows=30_000, seed=0)
    write_rows(tmp_path / "part", rows=9_000, seed=0, planned=30_000)
    assert read_rows(tmp_path / "part").equals(read_rows(tmp_path / "whole").slice(0, 9_000))


def test_bad_numbers_of_rows_are_refused(tmp_path):
    with pytest.raises(ValueError, match="rows must lie between 1 and planned=9, got 10"):
        write_rows(tmp_path / "rows", rows=10, seed=0, planned=9)


def test_the_exact_posterior_has_no_gradient_and_the_curvature_of_all_rows(tmp_path):
    write_rows(tmp_path / "rows", rows=30_000, seed=0)
    posterior = exact_posterior(tmp_path / "rows")
    rows = np.column_stack([c.to_numpy().astype(float) for c in read_rows(tmp_path / "rows")])
    x, up = np.column_stack([np.ones(len(rows)), rows[:, :-1]]), rows[:, -1]
    p = 1 / (1 + np.exp(-x @ posterior.mean))
    precision = x.T @ (x * (p * (1 - p))[:, None]) + np.eye(4) / PRIOR_SD**2
    gradient = x.T @ (up - p) - np.array(posterior.mean) / PRIOR_SD**2
    np.testing.assert_allclose(np.linalg.solve(precision, gradient), 0, atol=1e-9)
    np.testing.assert_allclose(posterior.sd, np.sqrt(np.diag(np.linalg.inv(precision))), rtol=1e-6)
    assert posterior.n_rows == 30_000


def test_a_killed_parent_leaves_no_process_behind():
    code = f"from time import sleep; from {in_process.__module__} import in_process\n"
    code += "if __name__ == '__main__': in_process(sleep, 300)"
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT) as parent:
        process = psutil.Process(parent.pid)
        children = wait_for(lambda: len(process.children()) > 1 and process.children())
        parent.kill()
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not alive


@pytest.mark.slow
def test_a_run_leaves_its_records_and_publishes(tmp_path):
    command = [sys.executable, "-m", "tests.orderbook.small_reproduce", str(tmp_path), "30"]
    flags = f"{os.environ.get('PYTENSOR_FLAGS', '')},cxx=,mode=FAST_COMPILE".lstrip(",")
    subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTENSOR_FLAGS": flags}, check=True)
    assert {path.name for path in tmp_path.iterdir()} == {"records.json", "results"}
    published = json.loads((tmp_path / "results" / "reproduce.json").read_text())
    case = published["records"]["0.02M"]
    assert list(case) == ["exact", "preshuffle", "preshuffled"]
    assert not case["preshuffled"]["result"]["examination"]["order"]["ordered"]
    assert str(tmp_path) not in json.dumps(published)


def test_the_numbers_of_a_run_are_published_without_running(tmp_path):
    """So the tables of the page are those of its numbers."""
    page = tmp_path / "page.md"
    page.write_text(PAGE.read_text().replace("| 121.8M |", "| stale |"))
    assert len(re.findall(f"written by `{COMMAND}`", page.read_text())) == 5
    arguments = ["--numbers", str(NUMBERS), "--results", str(tmp_path), "--page", str(page)]
    run_command(reproduce.reproduce, arguments)
    assert page.read_text() == PAGE.read_text()
    assert (tmp_path / "reproduce.png").stat().st_size > 10_000


def test_fits_that_are_corrected_end_at_the_exact_posterior_in_the_published_run():
    worst = []
    for case in json.loads(NUMBERS.read_text())["records"].values():
        exact = case["exact"]["result"] if "exact" in case else {}
        for record in case.values():
            examined = record["result"].get("examination") if exact else None
            if examined:
                off = np.subtract(examined["corrected"]["mean"], exact["mean"]) / exact["sd"]
                worst.append(np.abs(off).max())
    assert len(worst) == 13
    assert max(worst) < 0.002


def test_what_cannot_work_is_refused_at_once(tmp_path):
    options = {"work": tmp_path / "work", "results": tmp_path / "results"}
    with pytest.raises(FileNotFoundError, match="no Parquet files and no messages"):
        reproduce.reproduce(captures=str(tmp_path), **options)
    with pytest.raises(ValueError, match="sizes must lie between 1 and 121800000"):
        reproduce.reproduce("2e8", **options)
    assert not (tmp_path / "results").exists()


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end
        time.sleep(0.02)
    return found
