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
"""Show how ordered rows spoil a posterior, and how ``preshuffle`` repairs it.

    python -m benchmarks.orderbook.demo
    python -m benchmarks.orderbook.demo --data DIR --features mid,spread --label up

Without ``--data``, synthetic order-book messages are made and folded. DIR holds captures of
Kalshi's order books, or Parquet files of your own with a column of 0 and 1.
The table and the figure are saved in ``build/demo``.
"""

import shutil
import sys
import time

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.harness import filled, in_process, markdown, run_command
from benchmarks.orderbook.columns import choose, holds_messages

# All else is imported when the data are known to be such that can be fitted, which is at once.
if TYPE_CHECKING:
    from benchmarks.orderbook.experiment import Posterior

__all__ = ["demo"]

MESSAGES = 2_500_000
SEED = 0
WINDOW_SHARE = 20
IN_MEMORY, ORDERED, SHUFFLED = "in memory", "ordered", "preshuffled"
WAYS = {
    IN_MEMORY: ("in memory, pm.Minibatch", "tab:gray"),
    ORDERED: ("streamed in order of time", "tab:red"),
    SHUFFLED: ("streamed after preshuffle", "tab:blue"),
}
"""What is said of each way in which the rows come, and its color."""
LEGEND_OF_TABLE = (
    "Error of the posterior means in posterior standard deviations.  By coefficient: means\n"
    "averaged over the second half of the steps.  Last step: the worst of them then.\n"
    "Memory: the peak of the process."
)

Fits = dict[str, dict[str, Any]]


def run(exact: "Posterior", rows: Path, columns: tuple[str, ...], work: Path, n_steps: int) -> Fits:
    """Fit the model to the *columns* of *rows* in three ways, with what is made on the way in *work*."""
    from benchmarks.orderbook.experiment import BATCH_SIZE, fit_model
    from pymc.variational.streaming import preshuffle

    buffer_size = max(exact.n_rows // WINDOW_SHARE, BATCH_SIZE)
    say(f"{exact.n_rows:,} rows; the buffer holds {buffer_size:,} of them")
    fits: Fits = {}
    for name, (legend, _) in WAYS.items():
        if name == SHUFFLED:
            say("\nShuffling the rows once, on disk")
            shuffled = work / "shuffled"
            options = {"seed": SEED, "columns": columns, "overwrite": True, "progressbar": False}
            in_process(preshuffle, rows, shuffled, **options)
            rows = shuffled
        say(f"\n{legend}")
        fits[name] = in_process(
            fit_model,
            rows,
            buffer_size=None if name == IN_MEMORY else buffer_size,
            n_steps=n_steps,
            seed=SEED,
            columns=columns,
            examine=name == SHUFFLED,
        )
        for warning in fits[name]["warnings"]:
            say(f"StreamWarning: {warning}")
    examination = fits[SHUFFLED]["examination"]
    say("\n" + "\n\n".join([*examination["said"], examination["refusal"] or ""]))
    return fits


def say(text: str) -> None:
    sys.stderr.write(f"{text}\n")


def markdown_table(exact: "Posterior", fits: Fits) -> str:
    """Return the results as a table for the README."""
    lines = []
    for name, fit in fits.items():
        cells = [name, *(f"{e:+.2f}" for e in exact.errors(fit["averaged"]))]
        cells += [f"{abs(exact.errors(fit['last'])).max():.1f}"]
        lines.append([*cells, f"{fit['peak_mb']:.0f} MB", f"{fit['steps_per_second']:.0f}"])
    if corrected := fits[SHUFFLED]["examination"]["corrected"]:
        cells = [f"{e:+.2f}" for e in exact.errors(corrected["mean"])]
        lines.append(["polished", *cells, "", "", ""])
    heads = ["Rows", *exact.names, "last step", "memory", "steps/s"]
    return markdown(" | ".join(heads), lines)


def plot(exact: "Posterior", fits: Fits, file: Path) -> None:
    """Draw the way of the worst coefficient."""
    from matplotlib.figure import Figure

    from benchmarks.orderbook.experiment import TRACED_EVERY

    worst = int(np.abs(exact.errors(fits[ORDERED]["averaged"])).argmax())
    figure = Figure(figsize=(7, 4), layout="constrained")
    ax = figure.subplots()
    for (legend, color), fit in zip(WAYS.values(), fits.values()):
        trace = np.array(fit["trace"])[:, worst]
        steps = TRACED_EVERY * np.arange(1, len(trace) + 1)
        ax.plot(steps, trace, color=color, label=legend, lw=1)
    ax.axhline(exact.mean[worst], color="black", ls="--", lw=1, label="exact")
    ax.set(xlabel="step", ylabel=f"posterior mean of {exact.names[worst]}")
    ax.legend(frameon=False)
    figure.savefig(file, dpi=120)


def _prepare(
    data: str, features: Sequence[str] | None, label: str, work: Path
) -> tuple["Posterior", Path, tuple[str, ...]]:
    """Return the exact posterior, the directory of the rows, and the columns to fit."""
    rows, messages = Path(data), not data or holds_messages(Path(data))
    columns = () if messages else choose(rows, features=features, label=label)

    from benchmarks.orderbook.experiment import exact_posterior
    from benchmarks.orderbook.fold import fold
    from benchmarks.orderbook.generate import generate

    work.mkdir(parents=True, exist_ok=True)
    if not data:
        say("Making synthetic order-book messages")
        rows = work / "messages"
        generate(rows, messages=MESSAGES, seed=SEED, format="parquet", overwrite=True)
    if messages:
        say("Folding messages into rows")
        say(str(fold(rows, work / "rows", overwrite=True)))
        rows = work / "rows"
        columns = choose(rows, features=features, label=label)
    told = f"features: {', '.join(columns[:-1])}; label: {columns[-1]}"
    say(f'{told} (others: FEATURES="..." LABEL=...)')
    return exact_posterior(rows, columns), rows, columns


def demo(
    data: str = "",
    features: str = "",
    label: str = "",
    results: Path = Path("build/demo"),
    steps: int = 8_000,
    readme: str = "",
) -> str:
    """Fit ordered rows, which go wrong, and shuffled ones, which go right."""
    if steps <= 1_000:
        raise ValueError(f"--steps must be more than 1000, got {steps}")
    if data and not Path(data).is_dir():
        raise ValueError(f"DATA={data} is not a directory")
    chosen = [name.strip() for name in features.split("," if "," in features else None)] or None
    started = time.perf_counter()
    work = Path("build/demo/tables")
    try:
        exact, rows, columns = _prepare(data, chosen, label, work)
        fits = run(exact, rows, columns, work, steps)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    results.mkdir(parents=True, exist_ok=True)
    table = markdown_table(exact, fits)
    (results / "demo.md").write_text(table)
    plot(exact, fits, results / "demo.png")
    if readme:
        page = Path(readme)
        page.write_text(filled(page.read_text(), "demo", "make results", table))
    say(f"{time.perf_counter() - started:.0f} s; the figure is {results / 'demo.png'}")
    return f"\n{table}\n{LEGEND_OF_TABLE}"


if __name__ == "__main__":
    run_command(demo)
