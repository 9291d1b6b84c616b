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
"""How often the order check is wrong, and whether a fit of an hour grows.

    python -m benchmarks.reliability --only power alarms soak --page docs/source/reliability.md
    python -m benchmarks.reliability --only orders --page docs/source/streaming/order.md

The last is a fit at full speed, by :func:`resumable_fit` with checkpoints.  Growth is from the
second quarter of the readings, by which time every buffer is full, to the last: of the median for
memory, of the most for files and threads.  The program exits with 1 if something grew.

With ``--datasets 0 --repeats 0 --minutes 0`` the tables are those of the results.
"""

import sys
import threading
import time

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytensor.tensor as pt

from rich.progress import track

import pymc as pm

from benchmarks.cases import Case, Data, stream
from benchmarks.harness import about, load, markdown, measure, save
from pymc.variational._streaming.likelihood import Factors
from pymc.variational._streaming.order.monitor import Monitor
from pymc.variational._streaming.order.preflight import preflight
from pymc.variational._streaming.order.ranks import ALPHA
from pymc.variational._streaming.order.report import OrderReport, Stream
from pymc.variational._streaming.order.statistic import Features, ModelScore
from pymc.variational._streaming.sources.arrays import as_source
from pymc.variational.streaming import StreamingDataset, check_order, resumable_fit
from tests.variational.streaming.order.test_score import CASES, model_of
from tests.variational.streaming.order.test_score import WINDOW as CASE_WINDOW

__all__ = ["COMMAND", "TABLES"]

COMMAND = "python -m benchmarks.reliability"
RESULTS = Path("docs/source/results")
MARGINALS = {
    "normal": lambda rng, n: rng.normal(size=n),
    "Student-t(2)": lambda rng, n: rng.standard_t(2, n),
    "Cauchy": lambda rng, n: rng.standard_cauchy(n),
    "log-normal": lambda rng, n: rng.lognormal(0, 3, n),
    "uniform": lambda rng, n: rng.random(n),
    "fair binary": lambda rng, n: rng.random(n) < 0.5,
    "binary, 1 in 100": lambda rng, n: rng.random(n) < 1e-2,
    "binary, 1 in 1,000": lambda rng, n: rng.random(n) < 1e-3,
    "binary, 1 in 10,000": lambda rng, n: rng.random(n) < 1e-4,
    "constant": lambda rng, n: np.full(n, 0.1),
    "Student-t(1/2)": lambda rng, n: rng.standard_t(0.5, n),
    "Pareto(1)": lambda rng, n: rng.pareto(1, n),
    "one value of 1e9": lambda rng, n: 1e9 * (np.arange(n) == n // 2),
    "mostly zero": lambda rng, n: rng.lognormal(0, 2, n) * (rng.random(n) < 0.01),
    "counts": lambda rng, n: rng.poisson(0.05, n),
    "classes": lambda rng, n: rng.integers(0, 10, n),
    "zero-inflated Cauchy": lambda rng, n: rng.standard_cauchy(n) * (rng.random(n) < 0.05),
}
SHUFFLED_ROWS, SHUFFLED_WINDOW = 20_500, 2_000
LEVELS = [0.3, 0.1, 0.03, 0.01, 3e-3, 1e-3, 3e-4, 1e-4]

EFFECTS = [1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0, 10.0, 15.0, 25.0, 50.0, 100.0]
N_ROWS, WINDOW, BATCH = 400_000, 20_000, 1_000
EPOCHS = 5

ALLOWED_MB = 20.0
"""Between the medians of two quarters; the allocator alone moves single readings by ten."""
MOST_STEPS_PER_SECOND = 4_000
"""Of the model of the soak, which ends when the time is up; PyMC keeps room for all losses."""
READ_EVERY = 5
"""Seconds between two readings of the process."""


def orders(data: Data, repeats: int, results: Path, **_: Any) -> str:
    """Check orders that bias a model, by columns and by its score, and the same rows shuffled."""
    found = _kept(results, "cases", repeats, lambda: [_case(name) for name in CASES])
    checks = [f"{stage}, {by}" for by in ("columns", "score") for stage in ("sample", "stream")]
    text = markdown(
        "order | by columns: sample | stream | by the model's score: sample | stream",
        ([x["case"], *("found" if x[c][0] else "not found" for c in checks)] for x in found),
    )
    alarms = sum(case[check][1] for case in found for check in checks)
    return f"{text}\nThe same rows, shuffled, raised {alarms or 'no'} alarm in any of them.\n"


def _case(name: str) -> dict[str, Any]:
    make, observe = CASES[name]
    rows = make(np.random.default_rng(0))
    model, _ = model_of(observe, rows.shape[1])
    both = rows, np.random.default_rng(1).permutation(rows)
    case: dict[str, Any] = {"case": name}
    for by, chosen in {"columns": None, "score": model}.items():
        for stage in ("sample", "stream"):
            sources = (
                x if stage == "sample" else (lambda x=x: iter(np.array_split(x, 17))) for x in both
            )
            reports = (check_order(x, model=chosen, buffer_size=CASE_WINDOW) for x in sources)
            case[f"{stage}, {by}"] = [report.ordered for report in reports]
    return case


def power(data: Data, repeats: int, results: Path, **_: Any) -> str:
    """Check data sets whose window means have a known variance, and fit their mean."""
    found = _kept(results, "power", repeats, lambda: [_power(e, repeats) for e in track(EFFECTS)])
    lines = []
    for point in found:
        low, middle, high = point["last_iterate"]
        seen = (f"{100 * point['detected'][stage]:.0f} %" for stage in ("sample", "stream"))
        drifts = f"{point['expected_drift']:.2g}", f"{middle:.0f} ({low:.0f}–{high:.0f})"
        lines.append([f"{point['design_effect']:g}", *drifts, *seen])
    heads = "design effect | √(ρN) | last iterate of Adam, median (quartiles)"
    return markdown(f"{heads} | found by the sample | found by the stream", lines)


def alarms(data: Data, datasets: int, results: Path, **_: Any) -> str:
    """Check shuffled data sets, and count those that alarm at each level."""
    found = _kept(results, "false_alarms", datasets, lambda: _alarms(datasets))
    shares = found["share_below_level"]
    lines = [
        [f"{level:g}", *(f"{share:.2g}" for share in row)]
        for level, *row in zip(found["levels"], *shares.values())
    ]
    lines.append(["alarms", *found["alarms"].values()])
    return markdown(" | ".join(["level of the test", *shares]), lines)


def _kept(results: Path, name: str, number: int, find: Callable[[], Any]) -> Any:
    """Return what is found now, which is kept, or with a number of zero what was found before."""
    file = results / "order_power.json"
    if number:
        found = load(file) | {name: find(), "about": about("pymc", "pytensor", "scipy")}
        save(found, file)
    return load(file)[name]


def _alarms(datasets: int) -> dict[str, Any]:
    found = [_check_shuffled(i) for i in track(range(datasets))]
    p = {stage: np.array([check[stage][0] for check in found]) for stage in found[0]}
    return {
        "datasets": datasets,
        "nominal": ALPHA,
        "alarms": {stage: sum(check[stage][1] for check in found) for stage in p},
        "levels": LEVELS,
        "share_below_level": {
            stage: [float(np.mean(some < level)) for level in LEVELS] for stage, some in p.items()
        },
    }


def _check_shuffled(i: int) -> dict[str, tuple[float, bool]]:
    """Return for each check of two to four random marginals the least p-value and if it alarms.

    The p-values are as shares of the nominal level.
    """
    model = _regression()
    rng = np.random.default_rng(np.random.SeedSequence(0, spawn_key=(i,)))
    names = rng.choice(list(MARGINALS), rng.integers(2, 5), replace=False)
    rows = np.column_stack([MARGINALS[name](rng, SHUFFLED_ROWS) for name in names])
    rows = rng.permutation(rows.astype(float))
    four = np.column_stack([rows, np.ones((SHUFFLED_ROWS, 4 - len(names)))])
    by_score = lambda pilot: model.at(pilot, SHUFFLED_ROWS) or Features(pilot, None)  # noqa: E731
    found = {
        "sample, columns": _sample(rows, SHUFFLED_WINDOW, seed=i),
        "stream, columns": _stream(rows, SHUFFLED_WINDOW),
        "sample, score": _sample(four, SHUFFLED_WINDOW, by_score, seed=i),
        "stream, score": _stream(four, SHUFFLED_WINDOW, by_score),
    }
    return {
        stage: (
            min(float(r.p_value / r.threshold * ALPHA) for r in reports),
            any(r.ordered for r in reports),
        )
        for stage, reports in found.items()
    }


@cache
def _regression() -> ModelScore:
    """Return a linear regression with an unknown scale, whose score has even heavier tails."""
    ds = StreamingDataset(np.zeros((1, 4)), batch_size=1, total_size=1, order_check="off")
    with pm.Model() as model:
        b, x = pm.Normal("b", 0, 10, shape=4), pt.as_tensor(ds.as_tensor())
        mean = b[0] + b[1] * x[:, 0] + b[2] * x[:, 1] + b[3] * x[:, 2]
        pm.Normal("y", mean, pm.HalfNormal("s", 10), observed=x[:, 3], total_size=SHUFFLED_ROWS)
    return ModelScore(Factors(model), ds.as_tensor())


def _power(effect: float, n_repeats: int) -> dict[str, Any]:
    seen = {"sample": 0, "stream": 0}
    drifts = []
    for i in range(n_repeats):
        rng = np.random.default_rng(np.random.SeedSequence(1, spawn_key=(int(10 * effect), i)))
        rows = _drifting(effect, rng)
        seen["sample"] += any(r.ordered for r in _sample(rows, WINDOW))
        seen["stream"] += any(r.ordered for r in _stream(rows, WINDOW))
        drifts.append(_last_iterate(rows[:, 0], rng))
    return {
        "design_effect": effect,
        "expected_drift": float(np.sqrt((effect - 1) * N_ROWS / WINDOW)),
        "detected": {stage: n / n_repeats for stage, n in seen.items()},
        "last_iterate": [float(q) for q in np.quantile(drifts, [0.25, 0.5, 0.75])],
    }


def _by_columns(pilot: np.ndarray) -> Features:
    return Features(pilot, None)


def _sample(rows: np.ndarray, window: int, by=_by_columns, seed: int = 0) -> list[OrderReport]:
    report = preflight(Stream(as_source(rows), window, len(rows)), by, seed)
    assert report is not None
    return [report]


def _stream(rows: np.ndarray, window: int, by=_by_columns) -> list[OrderReport]:
    """Return the reports of all comparisons in one epoch."""
    monitor = Monitor(Stream(as_source(rows), window, len(rows)), by)
    reports = []
    for first in range(0, len(rows), window):
        monitor.add(first, rows[first : first + window])
        reports.append(monitor.compare(last=first + window >= len(rows)))
    return [report for report in reports if report is not None]


def _drifting(effect: float, rng: np.random.Generator) -> np.ndarray:
    """Return a column whose mean drifts smoothly, and one beside it that does not."""
    time = np.arange(0.5, N_ROWS // WINDOW) * WINDOW / N_ROWS
    shift = np.sin(2 * np.pi * (rng.uniform(0.3, 3) * time + rng.random()))
    shift = (shift - shift.mean()) / shift.std(ddof=1)
    correlation = (effect - 1) / (WINDOW - 1)
    rows = rng.normal(size=(N_ROWS, 2))
    rows[:, 0] += np.sqrt(correlation / (1 - correlation)) * np.repeat(shift, WINDOW)
    return rows


def _last_iterate(y: np.ndarray, rng: np.random.Generator) -> float:
    """Return how many posterior sd Adam's last iterate is off, for the mean of a normal.

    Mean-field ADVI with the scale at its optimum, through a shuffle buffer of one window.
    """
    sd = 1 / np.sqrt(len(y))
    mu, m, v, step = float(y.mean()), 0.0, 0.0, 0
    for _ in range(EPOCHS):
        shuffled = rng.permuted(y.reshape(-1, WINDOW), axis=1)
        for mean in shuffled.reshape(-1, BATCH).mean(axis=1):
            step += 1
            gradient = len(y) * (mu + sd * rng.normal() - mean)
            m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
            mu -= 0.02 * (m / (1 - 0.9**step)) / (np.sqrt(v / (1 - 0.999**step)) + 1e-8)
    return abs(mu - float(y.mean())) / sd


def soak(data: Data, minutes: float, results: Path, **_: Any) -> str:
    """Fit for so many minutes, or with zero tell of the fit before."""
    file = results / "soak.json"
    if minutes:
        readings = _readings(data, 60 * minutes)
        fit = {"about": about("pymc", "pytensor"), "minutes": minutes, "rows": data.n_rows}
        save({**fit, **_growth(readings), "readings": readings}, file)
    found = load(file)
    grown = found["growth"]
    return (
        f"{'flat' if found['flat'] else 'GREW'}: {found['steps']:,} steps in "
        f"{found['minutes']:g} minutes, {grown['mb']:+.1f} MB, "
        f"{grown['files']:+} files, {grown['threads']:+} threads\n"
    )


def _readings(data: Data, seconds: float) -> list[dict[str, float]]:
    """Fit until the time is up, and return what was read of the process meanwhile."""
    readings: list[dict[str, float]] = []
    process, start = psutil.Process(), 0.0

    def read(approx: Any, losses: Any, i: int) -> None:
        nonlocal start
        start = start or time.monotonic()
        passed = time.monotonic() - start
        if passed >= READ_EVERY * len(readings):
            memory = round(process.memory_info().rss / 2**20, 2)
            counts = {"files": process.num_fds(), "threads": threading.active_count()}
            readings.append({"seconds": round(passed, 1), "steps": i, "rss_mb": memory, **counts})
        if passed >= seconds:
            raise StopIteration("the time is up")

    case = Case(data.shuffled(data.order_book()), buffer_size=500_000)
    ds = stream(case)
    with pm.Model():
        case.observe(ds.as_tensor(), ds.total_size)
        resumable_fit(
            pm.ADVI(random_seed=0),
            int(MOST_STEPS_PER_SECOND * seconds),
            path=data.folder / "soak.fit",
            datasets=[ds],
            callbacks=[read],
            progressbar=False,
            obj_optimizer=pm.adam(learning_rate=0.01),
        )
    return readings


def _growth(readings: list[dict[str, float]]) -> dict[str, Any]:
    """Return what the readings come to."""
    _, early, _, late = np.array_split(np.array(readings), 4)
    memory = [np.median([each["rss_mb"] for each in quarter]) for quarter in (early, late)]
    growth = {"mb": round(float(memory[1] - memory[0]), 1)}
    for name in ("files", "threads"):
        growth[name] = max(each[name] for each in late) - max(each[name] for each in early)
    flat = growth["mb"] < ALLOWED_MB and growth["files"] <= 0 and growth["threads"] <= 0
    return {"steps": readings[-1]["steps"], "growth": growth, "flat": flat}


TABLES: dict[str, Callable[..., str]] = {
    "orders": orders,
    "power": power,
    "alarms": alarms,
    "soak": soak,
}

if __name__ == "__main__":
    text = measure(
        COMMAND, TABLES, rows=5e6, datasets=10_000, repeats=60, minutes=60.0, results=RESULTS
    )
    sys.exit(text.startswith("GREW"))
