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
"""Draw the figures of docs/source/streaming/why_order_matters.md, from rows and fits of its own.

    python -m docs.figures

The rows are sorted by time, and what they say drifts: ``y = b(t) x + noise``. The model does not
know of the drift, so that its posterior is that of one slope, known from all rows exactly.
"""

import warnings

from collections.abc import Iterator

import matplotlib
import numpy as np

from matplotlib.figure import Figure

import pymc as pm

from docs.pages import FIGURES
from pymc.variational.streaming import OrderWarning, StreamingDataset, shuffle_buffer

__all__ = ["last_errors", "preshuffled_by_hand", "rows_in_time", "slope_of"]

N_ROWS, WINDOW, BATCH = 400_000, 20_000, 1_000
STEPS = 4_000
NOISE = 1.0
ORDERED, SHUFFLED, PLAIN = "tab:red", "tab:blue", "0.55"
REPEATS = 9


def rows_in_time(n_rows: int, rng: np.random.Generator) -> np.ndarray:
    """Return rows of x and y; their slope falls from 0.8 to 0.2, with the time of the year."""
    time = np.linspace(0, 1, n_rows)
    x = rng.normal(size=n_rows)
    y = (0.5 + 0.3 * np.cos(np.pi * time)) * x + rng.normal(0, NOISE, n_rows)
    return np.column_stack([x, y])


def slope_of(rows: np.ndarray) -> float:
    """Return the least-squares slope through the origin."""
    return float(rows[:, 0] @ rows[:, 1] / (rows[:, 0] @ rows[:, 0]))


def batches(rows: np.ndarray, epoch: int = 0) -> Iterator[np.ndarray]:
    """Yield the batches that a shuffle buffer of one window gives."""
    blocks = shuffle_buffer(rows, buffer_size=WINDOW, batch_size=BATCH, seed=epoch)
    return iter(StreamingDataset(blocks, batch_size=BATCH))


def draw_batches(ordered: np.ndarray, shuffled: np.ndarray) -> Figure:
    """Draw single batches, and what each of them says about the slope."""
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    axes = figure.subplots(1, 4, sharex=True, sharey=True)
    early, middle, late = (list(batches(ordered))[k] for k in (10, 200, 390))
    panels = [
        ("random rows", next(batches(shuffled)), SHUFFLED),
        ("early rows", early, ORDERED),
        ("middle rows", middle, ORDERED),
        ("late rows", late, ORDERED),
    ]
    line = np.array([-3.0, 3.0])
    for ax, (title, batch, color) in zip(axes, panels):
        ax.scatter(*batch.T, s=3, color=color, alpha=0.35, lw=0)
        ax.plot(line, slope_of(ordered) * line, "k--", lw=1.2, label="all rows")
        ax.plot(line, slope_of(batch) * line, color=color, lw=2, label="this batch")
        ax.set(title=f"{title}\nslope {slope_of(batch):.2f}", xlabel="x", ylim=(-4, 4))
        ax.legend(frameon=False, loc="lower right", fontsize="x-small")
    axes[0].set_ylabel("y")
    return figure


def draw_gradients(ordered: np.ndarray, shuffled: np.ndarray) -> Figure:
    """Draw the gradient of each batch of an epoch at the exact posterior mean."""
    exact = slope_of(ordered)
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    ax = figure.subplots()
    for rows, color, label in (
        (ordered, ORDERED, "in order of time, through the buffer"),
        (shuffled, SHUFFLED, "shuffled first, through the same buffer"),
    ):
        pulls = [slope_of(batch) - exact for batch in batches(rows)]
        ax.plot(pulls, ".-", ms=3, lw=0.6, color=color, label=label)
    for edge in range(0, N_ROWS // BATCH + 1, WINDOW // BATCH):
        ax.axvline(edge, color="0.85", lw=0.8, zorder=0)
    ax.axhline(0, color="black", ls="--", lw=1)
    ax.set(
        xlim=(0, N_ROWS // BATCH),
        xlabel="batches of one epoch; grey lines divide the windows of the buffer",
        ylabel="where the batch pulls the slope",
    )
    ax.legend(frameon=False)
    return figure


def trace_of_fit(rows: np.ndarray) -> np.ndarray:
    """Fit the slope by ADVI on a stream of the rows; return its mean after each step."""
    trace: list[float] = []
    buffer = shuffle_buffer(rows, buffer_size=WINDOW, batch_size=BATCH, seed=0)
    ds = StreamingDataset(buffer, batch_size=BATCH)
    with pm.Model(), warnings.catch_warnings():
        warnings.simplefilter("ignore", OrderWarning)
        x, y = ds.as_tensor()[:, 0], ds.as_tensor()[:, 1]
        slope = pm.Normal("slope", 0, 10)
        pm.Normal("y", slope * x, NOISE, observed=y, total_size=ds.total_size)
        pm.fit(
            STEPS,
            callbacks=[
                lambda approx, *_: trace.append(float(approx.params[0].get_value()[0])),
                ds.fit_callback(),
            ],
            obj_optimizer=pm.adam(learning_rate=0.02),
            random_seed=0,
        )
    return np.array(trace)


def draw_fits(ordered: np.ndarray, shuffled: np.ndarray) -> Figure:
    """Draw the way of the posterior mean through two fits that differ in the order of rows."""
    exact, sd = slope_of(ordered), NOISE / np.linalg.norm(ordered[:, 0])
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    ax = figure.subplots()
    for rows, color, label in (
        (ordered, ORDERED, "in order of time"),
        (shuffled, SHUFFLED, "shuffled first"),
    ):
        trace = trace_of_fit(rows)
        off = abs(trace[-1] - exact) / sd
        ax.plot(trace, color=color, lw=1, label=f"{label}: ends {off:.0f} sd off")
    ax.axhline(exact, color="black", ls="--", lw=1, label=f"exact, known to ±{sd:.4f}")
    for end in range(0, STEPS + 1, N_ROWS // BATCH):
        ax.axvline(end, color="0.85", lw=0.8, zorder=0)
    ax.set(
        xlim=(0, STEPS),
        ylim=(0, 1.2),
        xlabel="step; grey lines divide the epochs",
        ylabel="posterior mean of the slope",
    )
    ax.legend(frameon=False, loc="upper center", ncols=3, fontsize="small", columnspacing=1)
    return figure


def last_errors(n_rows: int, window: int, *, shuffled: bool) -> list[float]:
    """Return errors of Adam's last step in posterior sd, one for each of some tables.

    The model is the mean of a normal, whose variational fit is a recursion of one number.
    """
    errors = []
    for repeat in range(REPEATS):
        rng = np.random.default_rng(np.random.SeedSequence(n_rows, spawn_key=(window, repeat)))
        time = np.arange(0.5, n_rows // BATCH) / (n_rows // BATCH)
        drift = 0.3 * np.cos(np.pi * time)
        batch_means = drift + rng.normal(0, 1 / np.sqrt(BATCH), len(time))
        if shuffled:  # a batch of random rows holds a bit of every time
            batch_means += rng.normal(0, drift.std() / np.sqrt(BATCH), len(time)) - drift
        errors.append(_last_error(batch_means, window // BATCH, n_rows, rng))
    return errors


def _last_error(
    batch_means: np.ndarray, per_window: int, n_rows: int, rng: np.random.Generator
) -> float:
    """Run Adam over whole epochs; the rows of a window are mixed before they are cut."""
    exact, sd = batch_means.mean(), 1 / np.sqrt(n_rows)
    windows = batch_means.reshape(-1, per_window)
    inside = windows.mean(axis=1, keepdims=True)
    mu, m, v, step = exact, 0.0, 0.0, 0
    while step < STEPS:
        noise = rng.normal(0, 1 / np.sqrt(BATCH), windows.shape)
        mixed = inside + noise - noise.mean(axis=1, keepdims=True)
        for batch in mixed.ravel():
            step += 1
            gradient = mu + sd * rng.normal() - batch
            m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
            mu -= 0.02 * (m / (1 - 0.9**step)) / (np.sqrt(v / (1 - 0.999**step)) + 1e-12)
    return abs(mu - exact) / sd


def draw_sizes() -> Figure:
    """Draw the error of a fit against the rows of the table, and against those of the buffer."""
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    by_rows, by_window = figure.subplots(1, 2, sharey=True)
    tables = [WINDOW * 4**k for k in range(5)]
    largest = WINDOW * 16
    windows = [BATCH * n for n in (1, 2, 5, 10, 20, 40, 80, 160, 320)]
    for shuffled, color, label in (
        (False, ORDERED, "in order of time"),
        (True, SHUFFLED, "shuffled first"),
    ):
        found = [last_errors(n, WINDOW, shuffled=shuffled) for n in tables]
        _band(by_rows, tables, found, color, label)
        found = [last_errors(largest, w, shuffled=shuffled) for w in windows]
        _band(by_window, [100 * w / largest for w in windows], found, color, label)
    by_rows.set(
        xlabel="rows of the table", title=f"a buffer of {WINDOW:,} rows", xscale="log", yscale="log"
    )
    by_rows.set_ylabel("error at the last step, posterior sd")
    by_window.set(
        xlabel="buffer, % of the table", title=f"a table of {largest:,} rows", xscale="log"
    )
    by_rows.legend(frameon=False)
    return figure


def _band(ax, places: list, found: list[list[float]], color: str, label: str) -> None:
    low, middle, high = np.quantile(found, [0.25, 0.5, 0.75], axis=1)
    ax.plot(places, middle, "o-", ms=4, color=color, label=label)
    ax.fill_between(places, low, high, color=color, alpha=0.2, lw=0)


def preshuffled_by_hand(
    n: int, n_partitions: int, rng: np.random.Generator
) -> list[list[np.ndarray]]:
    """Return rows 0 to n - 1 in the partitions of the first pass, and of the second."""
    partition = rng.integers(0, n_partitions, n)
    scattered = [np.flatnonzero(partition == k) for k in range(n_partitions)]
    return [scattered, [rng.permutation(rows) for rows in scattered]]


def draw_preshuffle() -> Figure:
    """Draw the two passes of a shuffle on disk on a few dozen rows."""
    n, n_partitions, gap = 60, 4, 2
    stages = preshuffled_by_hand(n, n_partitions, np.random.default_rng(3))
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    ax = figure.subplots()
    spread = gap * (n_partitions - 1)
    everything = [(np.arange(n), spread / 2)]
    rows_of = [everything, *(_with_gaps(partitions, gap) for partitions in stages)]
    rows_of.append([(np.concatenate(stages[1]), spread / 2)])
    labels = [
        "the table, sorted by time",
        "pass 1: each row to a random partition",
        "pass 2: each partition permuted, in memory",
        "the result, read from end to end",
    ]
    for level, (parts, label) in enumerate(zip(rows_of, labels)):
        for rows, left in parts:
            extent = (left, left + len(rows), -level - 0.5, -level)
            ax.imshow(rows[None], cmap="viridis", vmin=0, vmax=n - 1, extent=extent, aspect="auto")
        ax.text(spread / 2, -level + 0.08, label, va="bottom")
    ax.set(xlim=(-1, n + spread + 1), ylim=(-3.6, 0.45))
    ax.axis("off")
    return figure


def _with_gaps(partitions: list[np.ndarray], gap: int) -> list[tuple[np.ndarray, float]]:
    """Give each partition the place where it is drawn."""
    ends = np.cumsum([0, *(len(rows) + gap for rows in partitions)])
    return [(rows, float(left)) for rows, left in zip(partitions, ends)]


def main() -> None:
    matplotlib.use("agg")
    rng = np.random.default_rng(0)
    ordered = rows_in_time(N_ROWS, rng)
    shuffled = rng.permutation(ordered)
    for name, figure in (
        ("batches", draw_batches(ordered, shuffled)),
        ("gradients", draw_gradients(ordered, shuffled)),
        ("fits", draw_fits(ordered, shuffled)),
        ("sizes", draw_sizes()),
        ("preshuffle", draw_preshuffle()),
    ):
        figure.savefig(FIGURES / f"why_{name}.png", dpi=120)


if __name__ == "__main__":
    main()
