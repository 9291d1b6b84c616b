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
"""How often the order check is wrong: false alarms on shuffled rows, and power.

Feeds both checks, the sample before streaming and the stream itself, with shuffled data sets
of many marginals, and with data sets whose means drift by a known design effect; and follows
the last iterate of Adam on the latter.  Writes ``order_power.json`` and ``order_power.png``::

    python -m benchmarks.order_power --datasets 10000
"""

import argparse
import json

from collections.abc import Generator
from pathlib import Path

import numpy as np

from rich.progress import track

from pymc.variational._streaming.order import preflight
from pymc.variational._streaming.order.anova import ALPHA
from pymc.variational._streaming.order.monitor import Monitor
from pymc.variational._streaming.order.report import OrderReport, Stream
from pymc.variational._streaming.sources.arrays import as_source
from pymc.variational._streaming.sources.base import Source

__all__ = ["false_alarms", "power"]

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
    "mostly zero": lambda rng, n: rng.lognormal(0, 2, n) * (rng.random(n) < 0.01),
    "counts": lambda rng, n: rng.poisson(0.05, n),
    "classes": lambda rng, n: rng.integers(0, 10, n),
}
STREAM_ROWS, STREAM_WINDOW = 41_000, 1_000
SAMPLE_VALUES = 1 << 12
"""Of each window; a twentieth of what the check really reads, to be quick."""
LEVELS = [0.3, 0.1, 0.03, 0.01, 3e-3, 1e-3, 3e-4, 1e-4]

EFFECTS = [1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0, 10.0, 15.0, 25.0, 50.0, 100.0]
N_ROWS, WINDOW, BATCH = 400_000, 20_000, 1_000
EPOCHS = 5


class _Shuffled(Source):
    """A shuffled table of a billion rows: wherever it is read, new independent rows come."""

    n_rows = 1_000_000_000
    random_access = True

    def __init__(self, rows: np.ndarray):
        self.sample_shape = rows.shape[1:]
        self._rows = rows
        self._next = 0

    def read_starts(self, rows: np.ndarray) -> np.ndarray:
        return rows

    def blocks(
        self, epoch: int = 0, start: int = 0, *, block_rows: int | None = None
    ) -> Generator[np.ndarray]:
        first, self._next = self._next, self._next + 64
        yield self._rows[first : self._next]


def false_alarms(n_datasets: int, seed: int = 0) -> dict:
    """Check shuffled data sets of two to four random marginals."""
    scores: dict[str, list[float]] = {"sample": [], "stream": []}
    alarms = {"sample": 0, "stream": 0}
    for i in track(range(n_datasets), "shuffled data sets"):
        rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(i,)))
        names = rng.choice(list(MARGINALS), rng.integers(2, 5), replace=False)
        rows = np.column_stack([MARGINALS[name](rng, STREAM_ROWS) for name in names])
        for stage, reports in (("sample", _sample(rows, i)), ("stream", _stream(rows))):
            scores[stage].append(min(r.p_value / r.threshold * ALPHA for r in reports))
            alarms[stage] += any(r.ordered for r in reports)
    return {
        "datasets": n_datasets,
        "marginals": list(MARGINALS),
        "nominal": ALPHA,
        "alarms": alarms,
        "levels": LEVELS,
        "share_below_level": {
            stage: [float(np.mean(np.array(s) < level)) for level in LEVELS]
            for stage, s in scores.items()
        },
        "smallest_adjusted_p": {stage: min(s) for stage, s in scores.items()},
    }


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
            for stage, reports in (("sample", _sample_of(rows)), ("stream", _stream(rows, WINDOW))):
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


def _sample(rows: np.ndarray, seed: int) -> list[OrderReport]:
    source = _Shuffled(rows)
    report = preflight.preflight(Stream(source, source.n_rows // 100, source.n_rows), seed)
    assert report is not None
    return [report]


def _sample_of(rows: np.ndarray) -> list[OrderReport]:
    report = preflight.preflight(Stream(as_source(rows), WINDOW, len(rows)), 0)
    assert report is not None
    return [report]


def _stream(rows: np.ndarray, window: int = STREAM_WINDOW) -> list[OrderReport]:
    """Return the reports of all comparisons in one epoch."""
    monitor = Monitor(Stream(as_source(rows), window, len(rows)))
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
    bottom.plot(effects, expected, "k--", lw=1, label="√(ρN), which the report gives")
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
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    curve = power(options.repeats)
    preflight._WINDOW_VALUES = SAMPLE_VALUES
    preflight._BLOCK_ROWS = 0  # no block is reached by reading on from another
    command = "python -m benchmarks.order_power"
    results = {
        "command": f"{command} --datasets {options.datasets} --repeats {options.repeats}",
        "false_alarms": false_alarms(options.datasets),
        "power": curve,
    }
    (options.out / "order_power.json").write_text(json.dumps(results, indent=1) + "\n")
    plot(results, options.out / "order_power.png")


if __name__ == "__main__":
    main()
