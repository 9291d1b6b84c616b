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
    python -m benchmarks.orderbook.demo --data DIR

Without ``--data``, synthetic order-book messages are made and folded. DIR holds captures of
Kalshi's order books (``<market>/<date>.ndjson.gz``), or Parquet files of your own whose last
column is 0 or 1. The table and the figure are saved in ``build/demo``.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.orderbook.experiment import (
    BATCH_SIZE,
    TRACED_EVERY,
    Fit,
    Posterior,
    exact_posterior,
    fit_model,
    in_process,
    parquet_files,
)
from benchmarks.orderbook.fold import fold
from benchmarks.orderbook.generate import generate
from benchmarks.pages import filled

__all__ = ["main"]

MESSAGES = 2_500_000
SEED = 0
WINDOW_SHARE = 20
IN_MEMORY = "in memory"
ORDERED = "ordered"
SHUFFLED = "preshuffled"
LEGEND = {
    IN_MEMORY: "in memory, pm.Minibatch",
    ORDERED: "streamed in order of time",
    SHUFFLED: "streamed after preshuffle",
}

console = Console(stderr=True)


def run(data: Path | None, work: Path, n_steps: int) -> tuple[Posterior, dict[str, Fit]]:
    """Fit the model in three ways.

    Parameters
    ----------
    data : Path, optional
        Captures or Parquet files. Default: synthetic messages.
    work : Path
        Directory for what is made on the way.
    n_steps : int
        Of each fit.
    """
    rows = _rows(data, work)
    exact = exact_posterior(rows)
    buffer_size = max(exact.n_rows // WINDOW_SHARE, BATCH_SIZE)
    console.print(f"{exact.n_rows:,} rows; the buffer holds {buffer_size:,} of them")
    shuffled = work / "shuffled"
    fits = {}
    for name, folder, size in (
        (IN_MEMORY, rows, None),
        (ORDERED, rows, buffer_size),
        (SHUFFLED, shuffled, buffer_size),
    ):
        if folder is shuffled:
            _preshuffle(rows, shuffled)
        console.rule(LEGEND[name])
        fits[name] = in_process(fit_model, folder, buffer_size=size, n_steps=n_steps, seed=SEED)
        for warning in fits[name].warnings:
            console.print(f"[yellow]StreamWarning:[/] {warning}", highlight=False)
    return exact, fits


def errors(means: tuple[float, ...], exact: Posterior) -> np.ndarray:
    """Return how far means are from the exact ones, in posterior standard deviations."""
    return (np.array(means) - exact.mean) / exact.sd


def markdown_table(exact: Posterior, fits: dict[str, Fit]) -> str:
    """Return the results as a table for the README."""
    header = ["Rows", *exact.names, "last step", "memory", "steps/s"]
    lines = [header, ["---"] * len(header)]
    for name, fit in fits.items():
        cells = [name, *(f"{e:+.2f}" for e in errors(fit.averaged, exact))]
        cells += [f"{np.abs(errors(fit.last, exact)).max():.1f}"]
        lines.append([*cells, f"{fit.peak_mb:.0f} MB", f"{fit.steps_per_second:.0f}"])
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def show(exact: Posterior, fits: dict[str, Fit]) -> None:
    """Print the results as a table."""
    header, _, *lines = (
        [cell.strip() for cell in line.strip("| ").split("|")]
        for line in markdown_table(exact, fits).splitlines()
    )
    table = Table(
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        show_edge=False,
        title="Error of the posterior means, in posterior standard deviations",
        caption=(
            "By coefficient: means averaged over the second half of the steps. "
            "Last step: the worst of them then. Memory: the peak of the process."
        ),
    )
    for name in header:
        table.add_column(name, justify="left" if name == header[0] else "right", no_wrap=True)
    for line in lines:
        table.add_row(*line)
    Console().print(table)


def plot(exact: Posterior, fits: dict[str, Fit], file: Path) -> None:
    """Draw the way of the worst coefficient, and the errors of all of them."""
    from matplotlib.figure import Figure

    worst = int(np.abs(errors(fits[ORDERED].averaged, exact)).argmax())
    figure = Figure(figsize=(10, 4), layout="constrained")
    way, final = figure.subplots(1, 2)
    colors = {IN_MEMORY: "tab:gray", ORDERED: "tab:red", SHUFFLED: "tab:blue"}
    for offset, (name, fit) in enumerate(fits.items()):
        trace = np.array(fit.trace)[:, worst]
        steps = TRACED_EVERY * np.arange(1, len(trace) + 1)
        way.plot(steps, trace, color=colors[name], label=LEGEND[name], lw=1)
        places = np.arange(len(exact.names)) + (offset - 1) / 4
        final.bar(places, np.abs(errors(fit.averaged, exact)), 0.25, color=colors[name])
    way.axhline(exact.mean[worst], color="black", ls="--", lw=1, label="exact")
    way.set(xlabel="step", ylabel=f"posterior mean of {exact.names[worst]}")
    way.legend(frameon=False)
    final.set_xticks(range(len(exact.names)), exact.names)
    final.axhline(1, color="black", ls=":", lw=1)
    final.set(yscale="log", ylabel="error of the averaged means, posterior sd")
    figure.savefig(file, dpi=120)


def _rows(data: Path | None, work: Path) -> Path:
    """Return a directory of Parquet files, after folding messages if need be."""
    if data is not None and not data.is_dir():
        raise SystemExit(f"DATA={data} is not a directory")
    if data is not None and not any(data.rglob("*.ndjson.gz")):
        _check_label(data)
        return data
    if data is None:
        data = work / "messages"
        console.rule("Making synthetic order-book messages")
        generate(data, messages=MESSAGES, seed=SEED, overwrite=True)
    console.rule("Folding messages into rows")
    console.print(str(fold(data, work / "rows", overwrite=True)))
    return work / "rows"


def _check_label(rows: Path) -> None:
    label = pq.read_schema(parquet_files(rows)[0]).names[-1]
    values = set(pq.ParquetFile(parquet_files(rows)[0]).read_row_group(0, [label])[0].to_pylist())
    if not values <= {0, 1}:
        raise SystemExit(f"DATA={rows}: the last column, {label!r}, must hold only 0 and 1")


def _preshuffle(rows: Path, destination: Path) -> None:
    console.rule("Shuffling the rows once, on disk")
    command = ["-m", "pymc.variational.streaming", "preshuffle", str(rows), str(destination)]
    command += ["--seed", str(SEED), "--overwrite"]
    subprocess.run([sys.executable, *command], check=True)


def _save(exact: Posterior, fits: dict[str, Fit], results: Path) -> None:
    results.mkdir(parents=True, exist_ok=True)
    (results / "demo.md").write_text(markdown_table(exact, fits))
    posterior: dict[str, Any] = {
        "names": exact.names,
        "mean": exact.mean,
        "sd": exact.sd,
        "n_rows": exact.n_rows,
    }
    summary = {name: {**asdict(fit), "trace": None} for name, fit in fits.items()}
    (results / "demo.json").write_text(json.dumps({"exact": posterior, "fits": summary}, indent=1))
    plot(exact, fits, results / "demo.png")


def main(argv: list[str] | None = None) -> None:
    """Run the demonstration."""
    parser = argparse.ArgumentParser(description="Ordered rows go wrong, shuffled ones right.")
    parser.add_argument("--data", type=Path, help="captures, or Parquet with a 0/1 last column")
    parser.add_argument("--results", type=Path, default=Path("build/demo"))
    parser.add_argument("--steps", type=int, default=8_000, help="of each fit")
    parser.add_argument("--readme", type=Path, help="file to put the table into")
    args = parser.parse_args(argv)
    started = time.perf_counter()
    work = Path("build/demo/tables")
    work.mkdir(parents=True, exist_ok=True)
    try:
        exact, fits = run(args.data, work, args.steps)
    finally:
        shutil.rmtree(work)
    _save(exact, fits, args.results)
    if args.readme is not None:
        text = filled(args.readme.read_text(), "demo", "make results", markdown_table(exact, fits))
        args.readme.write_text(text)
    show(exact, fits)
    console.print(
        f"{time.perf_counter() - started:.0f} s; the figure is {args.results / 'demo.png'}"
    )


if __name__ == "__main__":
    main()
