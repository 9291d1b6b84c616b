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
of a model, with shuffled data sets of many marginals, with data sets whose means drift by a known
design effect, and with orders that bias a model; and follows the last iterate of Adam.  Writes
``order_power.json`` and ``order_power.png``, and a table into a page::

    python -m benchmarks.order_power --datasets 10000 --page docs/source/streaming/order.md
"""

import argparse
import json

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytensor.tensor as pt

from rich.progress import track

import pymc as pm

from benchmarks.pages import filled
from pymc.variational._streaming.order.monitor import Monitor
from pymc.variational._streaming.order.preflight import preflight
from pymc.variational._streaming.order.ranks import ALPHA
from pymc.variational._streaming.order.report import OrderReport, Stream
from pymc.variational._streaming.order.statistic import Features, ModelScore
from pymc.variational._streaming.sources.arrays import as_source
from pymc.variational.streaming import StreamingDataset, check_order
from tests.variational.streaming.order.test_score import CASES, model_of
from tests.variational.streaming.order.test_score import WINDOW as CASE_WINDOW

__all__ = ["check_shuffled", "false_alarms", "power", "summary"]

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
SAVE_EVERY = 250
LEVELS = [0.3, 0.1, 0.03, 0.01, 3e-3, 1e-3, 3e-4, 1e-4]

EFFECTS = [1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0, 10.0, 15.0, 25.0, 50.0, 100.0]
N_ROWS, WINDOW, BATCH = 400_000, 20_000, 1_000
EPOCHS = 5


def false_alarms(
    n_datasets: int, seed: int = 0, save: Callable[[dict], None] = lambda found: None
) -> dict:
    """Check shuffled data sets, and save what was found after every few hundred of them."""
    checks = []
    for i in track(range(n_datasets), "shuffled data sets"):
        checks.append(check_shuffled(i, seed))
        if i % SAVE_EVERY == 0:
            save(summary(checks))
    return summary(checks)


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
        "marginals": list(MARGINALS),
        "nominal": ALPHA,
        "alarms": {stage: sum(check[stage][1] for check in checks) for stage in p},
        "levels": LEVELS,
        "share_below_level": {
            stage: [float(np.mean(some < level)) for level in LEVELS] for stage, some in p.items()
        },
        "smallest_adjusted_p": {stage: float(some.min()) for stage, some in p.items()},
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
    """Check orders that bias a model, by columns and by its score."""
    found = []
    for name, (make, observe) in CASES.items():
        rows = make(np.random.default_rng(0))
        model, _ = model_of(observe, rows.shape[1])
        shuffled = np.random.default_rng(1).permutation(rows)
        case: dict = {"case": name}
        for by, chosen in (("columns", None), ("score", model)):
            for stage in ("sample", "stream"):
                reports = [
                    check_order(
                        x if stage == "sample" else (lambda x=x: iter(np.array_split(x, 17))),
                        model=chosen,
                        buffer_size=CASE_WINDOW,
                    )
                    for x in (rows, shuffled)
                ]
                case[f"{stage}, {by}"] = [r.ordered for r in reports]
        found.append(case)
    return found


def make_table(found: list[dict]) -> str:
    text = (
        "| order | by columns: sample | stream | by the model's score: sample | stream |\n"
        "|---|---|---|---|---|\n"
    )
    for case in found:
        cells = [
            "found" if case[f"{stage}, {by}"][0] else "not found"
            for by in ("columns", "score")
            for stage in ("sample", "stream")
        ]
        text += f"| {case['case']} | {' | '.join(cells)} |\n"
    alarms = sum(case[key][1] for case in found for key in case if "," in key)
    return f"{text}\nThe same rows, shuffled, raised {alarms or 'no'} alarm in any of them.\n"


def power(n_repeats: int, seed: int = 1) -> list[dict]:
    """Check data sets whose window means have a known variance, and fit their mean."""
    found = []
    for effect in track(EFFECTS, "design effects"):
        seen = {"sample": 0, "stream": 0}
        drifts = []
        for i in range(n_repeats):
            sequence = np.random.SeedSequence(seed, spawn_key=(int(10 * effect), i))
            rng = np.random.default_rng(sequence)
            rows = _drifting(effect, rng)
            for stage, reports in (
                ("sample", _sample(rows, WINDOW)),
                ("stream", _stream(rows, WINDOW)),
            ):
                seen[stage] += any(r.ordered for r in reports)
            drifts.append(_last_iterate(rows[:, 0], rng))
        found.append(
            {
                "design_effect": effect,
                "expected_drift": float(np.sqrt((effect - 1) * N_ROWS / WINDOW)),
                "detected": {stage: n / n_repeats for stage, n in seen.items()},
                "last_iterate": [float(q) for q in np.quantile(drifts, [0.25, 0.5, 0.75])],
            }
        )
    return found


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


def plot(results: dict, path: Path) -> None:
    """Draw power beside drift, and the calibration of the false alarms."""
    import matplotlib.pyplot as plt

    curve, shuffled = results["power"], results["false_alarms"]
    effects = [point["design_effect"] for point in curve]
    fig, (top, bottom, right) = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for stage in ("sample", "stream"):
        share = [point["detected"][stage] for point in curve]
        top.plot(effects, share, "o-", ms=4, label=f"the {stage}")
    top.set(xscale="log", xlabel="design effect", ylabel="share detected", title="Power")
    top.legend(frameon=False, loc="lower right")
    low, middle, high = np.array([point["last_iterate"] for point in curve]).T
    expected = [point["expected_drift"] for point in curve]
    bottom.plot(
        effects, expected, "k--", lw=1, label="√(ρN), which the report gives without a model"
    )
    bottom.plot(effects, middle, "o-", ms=4, label="last iterate of Adam (median, quartiles)")
    bottom.fill_between(effects, low, high, alpha=0.2, lw=0)
    bottom.set(xscale="log", xlabel="design effect", ylabel="posterior sd", title="Drift")
    bottom.legend(frameon=False)
    for ax in (top, bottom):
        ax.axvline(5, color="0.7", lw=1, zorder=0)
    for stage, share in shuffled["share_below_level"].items():
        right.loglog(shuffled["levels"], share, "o", ms=4, label=f"the {stage}")
    right.loglog(LEVELS, LEVELS, color="0.5", lw=1, label="nominal")
    right.set(
        xlabel="level of the test", ylabel="share of shuffled data sets", title="False alarms"
    )
    right.legend(frameon=False)
    fig.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--datasets", type=int, default=10_000, help="shuffled data sets")
    parser.add_argument("--repeats", type=int, default=100, help="data sets per design effect")
    parser.add_argument("--out", type=Path, default=Path("docs/source/results"))
    parser.add_argument("--page", type=Path, help="file to put the table of orders into")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    command = "python -m benchmarks.order_power"
    results: dict = {
        "command": f"{command} --datasets {options.datasets} --repeats {options.repeats}"
    }

    def save(**found) -> None:
        results.update(found)
        (options.out / "order_power.json").write_text(json.dumps(results, indent=1) + "\n")

    table = cases()
    save(cases=table)
    save(power=power(options.repeats))
    save(false_alarms=false_alarms(options.datasets, save=lambda found: save(false_alarms=found)))
    plot(results, options.out / "order_power.png")
    if options.page is not None:
        text = filled(options.page.read_text(), "orders", None, make_table(table))
        options.page.write_text(text)


if __name__ == "__main__":
    main()
