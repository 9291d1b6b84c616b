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
"""How often the order check is wrong: false alarms on shuffled rows, power, and kinds of order.

Feeds both checks, the sample before streaming and the stream itself, by columns and by the score
of a model, with orders that bias a model, with data sets whose means drift by a known design
effect, and with shuffled data sets of many marginals; and follows the last iterate of Adam::

    python -m benchmarks.order_power --only power alarms --page docs/source/reliability.md
    python -m benchmarks.order_power --only orders --page docs/source/streaming/order.md

With ``--datasets 0 --repeats 0`` the tables are those of ``order_power.json``.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytensor.tensor as pt

from rich.progress import track

import pymc as pm

from benchmarks.data import Data
from benchmarks.pages import about, load, markdown, measure, save
from pymc.variational._streaming.order.monitor import Monitor
from pymc.variational._streaming.order.preflight import preflight
from pymc.variational._streaming.order.ranks import ALPHA
from pymc.variational._streaming.order.report import OrderReport, Stream
from pymc.variational._streaming.order.statistic import Features, ModelScore
from pymc.variational._streaming.sources.arrays import as_source
from pymc.variational.streaming import StreamingDataset, check_order
from tests.variational.streaming.order.test_score import CASES, model_of
from tests.variational.streaming.order.test_score import WINDOW as CASE_WINDOW

__all__ = ["check_shuffled", "power", "summary"]

COMMAND = "python -m benchmarks.order_power"
RESULTS = Path("docs/source/results/order_power.json")
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


def orders_table(data: Data, datasets: int, repeats: int, results: Path) -> str:
    """Check orders that bias a model, by columns and by its score."""
    found = _kept(results, "cases", repeats, cases)
    checks = [f"{stage}, {by}" for by in ("columns", "score") for stage in ("sample", "stream")]
    text = markdown(
        "order | by columns: sample | stream | by the model's score: sample | stream",
        ([x["case"], *("found" if x[c][0] else "not found" for c in checks)] for x in found),
    )
    alarms = sum(case[check][1] for case in found for check in checks)
    return f"{text}\nThe same rows, shuffled, raised {alarms or 'no'} alarm in any of them.\n"


def power_table(data: Data, datasets: int, repeats: int, results: Path) -> str:
    found = _kept(results, "power", repeats, lambda: [power(e, repeats) for e in track(EFFECTS)])
    lines = []
    for point in found:
        low, middle, high = point["last_iterate"]
        seen = (f"{100 * point['detected'][stage]:.0f} %" for stage in ("sample", "stream"))
        drifts = f"{point['expected_drift']:.2g}", f"{middle:.0f} ({low:.0f}–{high:.0f})"
        lines.append([f"{point['design_effect']:g}", *drifts, *seen])
    heads = "design effect | √(ρN) | last iterate of Adam, median (quartiles)"
    return markdown(f"{heads} | found by the sample | found by the stream", lines)


def alarms_table(data: Data, datasets: int, repeats: int, results: Path) -> str:
    def shuffled() -> dict:
        return summary([check_shuffled(i) for i in track(range(datasets))])

    found = _kept(results, "false_alarms", datasets, shuffled)
    shares = found["share_below_level"]
    lines = [
        [f"{level:g}", *(f"{share:.2g}" for share in row)]
        for level, *row in zip(found["levels"], *shares.values())
    ]
    lines.append(["alarms", *found["alarms"].values()])
    return markdown(" | ".join(["level of the test", *shares]), lines)


def _kept(results: Path, name: str, number: int, find: Callable[[], Any]) -> Any:
    """Return what is found now, which is kept, or with a number of zero what was found before."""
    found = load(results)
    if number:
        save(found | {name: find(), "about": about("pymc", "pytensor", "scipy")}, results)
    return load(results)[name]


def check_shuffled(i: int, seed: int = 0) -> dict[str, tuple[float, bool]]:
    """Check two to four random marginals, by columns and by a model.

    Returns
    -------
    dict
        For each check the least p-value, as a share of the nominal level, and whether it alarms.
    """
    model = _regression()
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(i,)))
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


def summary(checks: list[dict[str, tuple[float, bool]]]) -> dict:
    """Return how many data sets alarm, and how their p-values lie."""
    p = {stage: np.array([check[stage][0] for check in checks]) for stage in checks[0]}
    return {
        "datasets": len(checks),
        "nominal": ALPHA,
        "alarms": {stage: sum(check[stage][1] for check in checks) for stage in p},
        "levels": LEVELS,
        "share_below_level": {
            stage: [float(np.mean(some < level)) for level in LEVELS] for stage, some in p.items()
        },
    }


@cache
def _regression() -> ModelScore:
    """Return a linear regression with an unknown scale, whose score has even heavier tails."""
    ds = StreamingDataset(np.zeros((1, 4)), batch_size=1, total_size=1, order_check="off")
    with pm.Model() as model:
        b, x = pm.Normal("b", 0, 10, shape=4), pt.as_tensor(ds.as_tensor())
        mean = b[0] + b[1] * x[:, 0] + b[2] * x[:, 1] + b[3] * x[:, 2]
        pm.Normal("y", mean, pm.HalfNormal("s", 10), observed=x[:, 3], total_size=SHUFFLED_ROWS)
    return ModelScore(model, ds.as_tensor())


def cases() -> list[dict]:
    """Return for each check whether it finds an order, and whether it alarms on shuffled rows."""
    found = []
    for name, (make, observe) in CASES.items():
        rows = make(np.random.default_rng(0))
        model, _ = model_of(observe, rows.shape[1])
        both = rows, np.random.default_rng(1).permutation(rows)
        case: dict = {"case": name}
        for by, chosen in {"columns": None, "score": model}.items():
            case[f"sample, {by}"] = [_is_ordered(x, chosen) for x in both]
            case[f"stream, {by}"] = [
                _is_ordered(lambda x=x: iter(np.array_split(x, 17)), chosen) for x in both
            ]
        found.append(case)
    return found


def _is_ordered(source: Any, model: pm.Model | None) -> bool:
    return check_order(source, model=model, buffer_size=CASE_WINDOW).ordered


def power(effect: float, n_repeats: int, seed: int = 1) -> dict:
    """Check data sets whose window means have a known variance, and fit their mean."""
    seen = {"sample": 0, "stream": 0}
    drifts = []
    for i in range(n_repeats):
        rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(int(10 * effect), i)))
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


if __name__ == "__main__":
    tables = {"orders": orders_table, "power": power_table, "alarms": alarms_table}
    measure(COMMAND, tables, rows=N_ROWS, datasets=10_000, repeats=60, results=RESULTS)
