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

    python -m benchmarks.zoo --page docs/source/zoo.md
    python -m benchmarks.zoo --models mixture --tools "polish|NumPyro.*"
    python -m benchmarks.zoo --only scale --folder scale

Right is what a user waits for: every mean within 0.1 posterior standard deviations of the
reference's, and every marginal standard deviation within the share that the model's entry names,
beyond three standard errors of the reference.  Each fit has a process of its own, and finds what
those before it have compiled if they share ``--folder``.  What the results hold is not measured
again; with ``--limit 0`` nothing is measured.  The last table is of two models with a hundred
million rows each.  Needs the extra ``zoo``.
"""

import importlib
import math
import os
import re
import resource
import shutil
import time
import warnings

from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from benchmarks import harness
from benchmarks.cases import Case, Data
from benchmarks.harness import about, in_process, load, markdown, save
from benchmarks.zoo_fits import CONTESTANTS, STATSMODELS, Moments
from benchmarks.zoo_models import MODELS, SCALED, Entry, rows_of
from pymc.variational.streaming import parquet_source, preshuffle
from tests.variational.streaming.memory import peak_mb

__all__ = ["case_of", "compare", "measure", "scale_table", "summary", "tables"]

COMMAND = "python -m benchmarks.zoo"
RESULTS = Path("docs/source/results/zoo.json")
SCALE_ROWS = 100_000_000
REFERENCE, REFERENCE_LIMIT = "reference", 3_600
MANY = 250
"""Parameters of which moments are kept with the results, of those that have more."""
MEAN_TOLERANCE = 0.1
MEMORY = 16 * 2**30
"""Bytes that a fit may have; dense matrices of 100,000 parameters ask for 80 GB."""
LIBRARIES = {"NumPyro": "numpyro.infer", "statsmodels": "statsmodels.api"}
POLISHED = "polish", "ADVI, then polish"
POLISH_HEADS = "right | worst mean | worst sd | median sd over the posterior's | passes | verdict"
REFERENCE_HEADS = "table | rows | parameters | its error of a mean | of a sd | seconds"
PACKAGES = "pymc", "pytensor", "numba", "numpyro", "jax", "statsmodels"

Found = dict[str, dict[str, Any]]
"""What was measured, by model and contestant."""


def run(data: Data, models: str, tools: str, limit: float, results: Path) -> Found:
    """Measure what is missing of each model, the reference first, and keep it in a file."""
    found = load(results)
    for model in MODELS:
        for name in (REFERENCE, *CONTESTANTS):
            reference = found.get(f"{model}: {REFERENCE}", {})
            if f"{model}: {name}" in found or "failed" in reference or not limit:
                continue
            if name == "statsmodels" and MODELS[model].model not in STATSMODELS:
                continue
            if re.fullmatch(models, model) and re.fullmatch(f"{REFERENCE}|{tools}", name):
                found[f"{model}: {name}"] = _child(model, name, data, reference, limit)
                found["about"] = {**about(*PACKAGES), "limit": limit}
                save(found, results)
    return found


def _child(model: str, name: str, data: Data, *arguments: Any) -> dict[str, Any]:
    """Return what a process finds, or why it found nothing."""
    caches = {
        "PYTENSOR_FLAGS": f"base_compiledir={data.folder / 'pytensor'}",
        "JAX_COMPILATION_CACHE_DIR": str(data.folder / "jax"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    try:
        with patch.dict(os.environ, caches):
            return in_process(_one, model, name, data, *arguments) or {"failed": "no result"}
    except BrokenProcessPool:
        return {"failed": "no result in time"}


def _one(model: str, name: str, data: Data, reference: dict, limit: float) -> dict[str, Any]:
    """Do what a process of its own is for."""
    patience = REFERENCE_LIMIT if name == REFERENCE else int(2 * limit) + 120
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (patience, resource.RLIM_INFINITY))
    warnings.simplefilter("ignore")
    try:
        case = case_of(model, data)
        if name == REFERENCE:
            return summary(MODELS[model], case.in_memory())
        return measure(model, case, name, reference, limit)
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {error}"}


def case_of(model: str, data: Data) -> Case:
    """Return a model of the zoo with its rows, so many as it says unless *data* does."""
    entry = MODELS[model]
    n_rows = data.n_rows or entry.n_rows

    def columns(rng: np.random.Generator, numbers: np.ndarray) -> dict[str, np.ndarray]:
        *x, y = rows_of(entry, n_rows)[numbers].T
        return {**{f"x{j}": column for j, column in enumerate(x)}, "y": y}

    return Case(data.of(f"{model} {n_rows}", n_rows, columns), entry.model)


def summary(entry: Entry, rows: np.ndarray) -> dict[str, Any]:
    """Return moments of the posterior, of all parameters or many, and their worst errors."""
    start = clock()
    if entry.exact is not None:
        made = entry.exact([rows])
    else:
        from benchmarks import zoo_references

        made = zoo_references.hmc(entry, rows)
    seconds, processor_seconds = clock() - start
    errors = _errors(made)
    if 3 * errors["mean_error"] > MEAN_TOLERANCE or 3 * errors["sd_error"] > entry.sd_tolerance:
        uncertain = f"{errors['mean_error']:.2g} sd and {errors['sd_error']:.1%}"
        return {"failed": f"the reference is {uncertain} uncertain"}
    at = compared(len(made["sd"]))
    return {
        "rows": len(rows),
        "parameters": len(made["sd"]),
        **errors,
        "seconds": seconds,
        "processor_seconds": processor_seconds,
        **{name: [float(f"{value:.6g}") for value in made[name][at]] for name in ("mean", "sd")},
    }


def compared(size: int) -> np.ndarray:
    """Return the places of parameters that are compared: all, or the outer and many others."""
    outer, inner = np.arange(min(size, 4)), np.linspace(0, size - 1, min(size, MANY))
    return np.unique(np.concatenate([outer, inner.astype(int), size - 1 - outer]))


def compare(entry: Entry, moments: Moments, reference: dict[str, Any]) -> dict[str, Any]:
    """Return the worst error of a mean, in posterior sd, and that of a sd, as a share of it.

    Each is what goes beyond three standard errors of the reference, which has all parameters or
    those that are compared of many.
    """
    mean, sd = map(np.asarray, moments[:2])
    if len(mean) != len(reference["mean"]):
        mean, sd = (values[compared(len(values))] for values in (mean, sd))
    if entry.match is not None:
        order, signs = entry.match(mean, np.array(reference["mean"]))
        mean, sd = signs * mean[order], sd[order]
    off, ratio = (mean - reference["mean"]) / reference["sd"], sd / reference["sd"]
    mean_error = float(np.maximum(abs(off) - 3 * reference["mean_error"], 0).max())
    sd_error = float(np.maximum(abs(ratio - 1) - 3 * reference["sd_error"], 0).max())
    found: dict[str, Any] = {
        "right": mean_error <= MEAN_TOLERANCE and sd_error <= entry.sd_tolerance,
        "mean_error": mean_error,
        "sd_error": sd_error,
        "median_sd": float(np.median(ratio)),
    }
    if moments.report is not None:
        found |= {"verdict": moments.report.verdict, "passes": moments.report.passes}
    return found


def measure(
    model: str, case: Case, contestant: str, reference: dict[str, Any], limit: float = math.inf
) -> dict[str, Any]:
    """Fit until right, or until *limit* seconds of processor time, comparisons not counted."""
    for prefix, library in LIBRARIES.items():
        if contestant.startswith(prefix):
            importlib.import_module(library)
    found: dict[str, Any] = {}
    start = clock()
    for estimate in CONTESTANTS[contestant](case):
        seconds, processor_seconds = clock() - start
        found = compare(MODELS[model], estimate(), reference)
        found |= {"seconds": seconds, "processor_seconds": processor_seconds, "peak_mb": peak_mb()}
        if found["right"] or processor_seconds > limit:
            break
        start = clock() - (seconds, processor_seconds)
    return found


def clock() -> np.ndarray:
    """Return seconds of the clock and of the processors."""
    return np.array([time.perf_counter(), time.process_time()])


def tables(found: Found) -> dict[str, str]:
    """Return the tables of what was measured as Markdown, by name."""
    tools, limit = _measured(found), found["about"]["limit"]
    missing = ", ".join(name for name in CONTESTANTS if name not in tools)
    note = f"\nTools not yet measured: {missing}.\n" if missing else ""

    def by_tool(tell: Callable[[dict], str]) -> str:
        def row(model: str, _: dict) -> list[str]:
            fits = (found.get(f"{model}: {tool}") for tool in tools)
            return ["" if fit is None else tell(fit) for fit in fits]

        return _by_model(found, " | ".join(tools), row) + note

    reasons = (f"{key}: {fit['failed'][:200]}" for key, fit in found.items() if "failed" in fit)
    return {
        "models": _by_model(found, REFERENCE_HEADS, _reference_cells),
        **{name: _by_model(found, POLISH_HEADS, _polish_cells, name) for name in POLISHED},
        "zoo": by_tool(_outcome)
        + f"\nFits that were not right were stopped after {limit:g} processor seconds.\n",
        "failures": "".join(f"- {reason}\n" for reason in reasons),
        "memory": by_tool(lambda fit: f"{fit['peak_mb']:,.0f}" if "peak_mb" in fit else ""),
    }


def _measured(found: Found) -> list[str]:
    return [name for name in CONTESTANTS if any(key.endswith(f": {name}") for key in found)]


def _by_model(
    found: Found, heads: str, row: Callable[[str, dict], list], name: str = REFERENCE
) -> str:
    """Return a table with a line for each model of which a fit succeeded."""
    lines, missing = [], []
    for model in MODELS:
        fit = found.get(f"{model}: {name}", {"failed": "not yet measured"})
        if "failed" in fit:
            missing.append(f"{model} ({fit['failed'][:200]})")
        else:
            lines.append([model, *row(model, fit)])
    if not lines:
        return "Not yet measured.\n"
    text = markdown(f"model | {heads}", lines)
    return text + (f"\nModels without a result: {'; '.join(missing)}.\n" if missing else "")


def _reference_cells(model: str, fit: dict) -> list[str]:
    size = f"{fit['rows']:,}", f"{fit['parameters']:,}"
    errors = f"{fit['mean_error']:.2g} sd", f"{100 * fit['sd_error']:.2g} %"
    return [MODELS[model].source, *size, *errors, _short(fit["processor_seconds"])]


def _polish_cells(_: str, fit: dict) -> list[str]:
    errors = f"{_short(fit['mean_error'])} sd", f"{_short(100 * fit['sd_error'])} %"
    cells = [f"{fit['median_sd']:.3f}", fit["passes"], fit["verdict"]]
    return ["yes" if fit["right"] else "no", *errors, *cells]


def _outcome(fit: dict) -> str:
    if "failed" in fit:
        return "fails"
    if fit["right"]:
        return f"**{_short(fit['processor_seconds'])}** ({_short(fit['seconds'])})"
    return f"{_short(fit['mean_error'])} sd, {_short(100 * fit['sd_error'])} %"


def _short(value: float) -> str:
    return f"{value:.2g}" if value < 99.5 else f"{value:,.0f}"


def plot(found: Found, path: Path) -> None:
    """Draw a cell for each fit, the more red the worse it is, with its seconds or its errors."""
    from matplotlib.figure import Figure

    names = [model for model in MODELS if "mean" in found.get(f"{model}: {REFERENCE}", {})]
    tools = _measured(found)
    figure = Figure(figsize=(3 + 0.9 * len(tools), 0.42 * len(names) + 2), layout="constrained")
    ax = figure.subplots()
    shades = np.full((len(names), len(tools)), np.nan)
    for i, j in np.ndindex(shades.shape):
        if (fit := found.get(f"{names[i]}: {tools[j]}")) is not None:
            shades[i, j] = _shade(fit, MODELS[names[i]].sd_tolerance)
            text = _outcome(fit).replace("*", "").replace(", ", "\n")
            ax.text(j, i, text, ha="center", va="center", fontsize=8)
    ax.imshow(shades, cmap="RdYlGn_r", vmin=-1.5, vmax=4.5, aspect="auto")
    ax.set_xticks(range(len(tools)), [name.replace(", ", ",\n") for name in tools], fontsize=8)
    ax.set_yticks(range(len(names)), names)
    ax.xaxis.tick_top()
    figure.savefig(path, dpi=130)


def _shade(fit: dict, sd_tolerance: float) -> float:
    """Return 0 for a fit that is right, and else from 1 to 3."""
    if fit.get("right"):
        return 0.0
    mean_error, sd_error = fit.get("mean_error", np.inf), fit.get("sd_error", 0)
    worst = max(mean_error / MEAN_TOLERANCE, sd_error / sd_tolerance, 1)
    return 1 + min(2.0, float(np.log10(worst)))


def scale(data: Data, results: Path, limit: float, **_: Any) -> str:
    """Measure the models that were not measured with so many rows, and return a line for each."""
    file, n_rows = results.with_name("scale.json"), data.n_rows or SCALE_ROWS
    found = load(file)
    for model in SCALED if limit else ():
        if found.get(model, {}).get("rows") != n_rows:
            found |= {model: _scaled(model, data, n_rows), "about": about(*PACKAGES, "pyarrow")}
            save(found, file)
    return scale_table(found)


def _scaled(model: str, data: Data, n_rows: int) -> dict[str, Any]:
    columns, exact = SCALED[model]
    ordered = data.of(f"{model} {n_rows}", n_rows, partial(columns, n_rows))
    shuffled = data.folder / f"{model} {n_rows} shuffled"
    shuffling = in_process(_shuffle, ordered, shuffled)
    reference, seconds = in_process(_refer, exact, ordered)
    fit = in_process(measure, model, Case(shuffled, MODELS[model].model), "polish", reference)
    shutil.rmtree(shuffled)
    numbers = {"rows": n_rows, "parameters": len(reference["mean"]), "reference_seconds": seconds}
    return {**numbers, "preshuffle": shuffling, "polish": fit}


def _shuffle(ordered: Path, shuffled: Path) -> dict[str, float]:
    start = clock()
    preshuffle(ordered, shuffled, seed=0, overwrite=True, progressbar=False)
    seconds, processor_seconds = clock() - start
    return {"seconds": seconds, "processor_seconds": processor_seconds, "peak_mb": peak_mb()}


def _refer(exact: Callable[..., dict], ordered: Path) -> tuple[dict[str, Any], float]:
    """Return the posterior of all rows, and the processor seconds that it took."""
    start, made = clock(), exact(parquet_source(ordered))
    return {**made, **_errors(made)}, float((clock() - start)[1])


def _errors(made: dict[str, Any]) -> dict[str, float]:
    """Return the worst standard errors of a reference, in posterior standard deviations."""
    return {f"{n}_error": float((made[f"{n}_se"] / made["sd"]).max()) for n in ("mean", "sd")}


def scale_table(found: dict[str, Any]) -> str:
    """Return a line for each model; seconds are of the clock, in brackets of all processors."""
    lines = []
    for model in (name for name in SCALED if name in found):
        one, fit = found[model], found[model]["polish"]
        seconds = (
            f"{each['seconds']:,.0f} ({each['processor_seconds']:,.0f})"
            for each in (one["preshuffle"], fit)
        )
        errors = f"{fit['mean_error']:.2g} sd", f"{100 * fit['sd_error']:.2g} %"
        costs = *seconds, fit["passes"], f"{fit['peak_mb']:,.0f}"
        size = f"{one['rows']:,}", f"{one['parameters']:,}"
        lines.append([model, *size, *costs, *errors, fit["verdict"]])
    heads = "model | rows | parameters | preshuffle, s | polish, s | passes | peak MB"
    return markdown(f"{heads} | worst mean | worst sd | verdict", lines)


def _table(name: str, data: Data, results: Path, **options: Any) -> str:
    """Return a table of what was measured, with the figure beside the results."""
    found = run(data, results=results, **options)
    if name == "zoo":
        plot(found, results.with_suffix(".png"))
    return tables(found)[name]


if __name__ == "__main__":
    names = "models", *POLISHED, "zoo", "failures", "memory"
    by_name = {name: partial(_table, name) for name in names} | {"scale": scale}
    harness.measure(COMMAND, by_name, rows=0, models=".*", tools=".*", limit=120.0, results=RESULTS)
