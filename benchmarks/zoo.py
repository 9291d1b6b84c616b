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
    python -m benchmarks.zoo --fits "mixture: (polish|NumPyro.*)"

Right is what a user waits for: every mean within 0.1 posterior standard deviations of the
reference's, and every marginal standard deviation within the share that the model's entry names,
beyond three standard errors of the reference.  Each fit has a process of its own.  What the results
hold is not measured again; with ``--limit 0`` nothing is measured.  Needs the extra ``zoo``.
"""

import importlib
import math
import re
import time
import warnings

from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import harness
from benchmarks.cases import Case, Data
from benchmarks.harness import about, in_process, load, markdown, save
from benchmarks.zoo_fits import CONTESTANTS, LIBRARIES, STATSMODELS, Moments
from benchmarks.zoo_models import MODELS, Entry
from tests.variational.streaming.memory import peak_mb

__all__ = ["case_of", "compare", "measure", "summary", "tables"]

COMMAND = "python -m benchmarks.zoo"
RESULTS = Path("docs/source/results/zoo.json")
REFERENCE = "reference"
MANY = 250
"""Parameters of which moments are kept with the results, of those that have more."""
MEAN_TOLERANCE = 0.1
POLISHED = "polish", "ADVI, then polish"
POLISH_HEADS = "right | worst mean | worst sd | median sd over the posterior's | passes | verdict"
REFERENCE_HEADS = "table | rows | parameters | its error of a mean | of a sd | seconds"
PACKAGES = "pymc", "pytensor", "numba", "numpyro", "jax", "statsmodels", "pyarrow"

Found = dict[str, dict[str, Any]]
"""What was measured, by model and contestant."""


def run(data: Data, fits: str, limit: float, results: Path) -> Found:
    """Measure what is missing of the fits that match, and their references, and keep it."""
    found = load(results)
    for model, entry in MODELS.items() if limit else ():
        tools = ["polish"] if entry.at_scale else CONTESTANTS
        wanted = [name for name in tools if re.fullmatch(fits, f"{model}: {name}")]
        for name in (REFERENCE, *wanted) if wanted else ():
            reference = found.get(f"{model}: {REFERENCE}", {})
            if f"{model}: {name}" in found or "failed" in reference:
                continue
            if name == "statsmodels" and entry.model not in STATSMODELS:
                continue
            try:
                fit = in_process(_one, model, name, data, reference, limit)
            except BrokenProcessPool:
                fit = {"failed": "its process was killed"}
            found |= {f"{model}: {name}": fit, "about": {**about(*PACKAGES), "limit": limit}}
            save(found, results)
    return found


def _one(model: str, name: str, data: Data, reference: dict, limit: float) -> dict[str, Any]:
    """Return what a process of its own finds, or why it found nothing."""
    warnings.simplefilter("ignore")
    try:
        case = case_of(model, data)
        if name == REFERENCE:
            return summary(MODELS[model], case)
        return measure(model, case, name, reference, limit)
    except Exception as error:  # of any library, such as that memory is too small
        return {"failed": f"{type(error).__name__}: {error}"[:200]}


def case_of(model: str, data: Data) -> Case:
    """Return a model of the zoo with its rows, so many as it says unless *data* does."""
    entry = MODELS[model]
    n_rows = data.n_rows or entry.n_rows
    rows = data.of(f"{model} {n_rows}", n_rows, partial(entry.columns, n_rows))
    return Case(data.shuffled(rows) if entry.at_scale else rows, entry.model)


def summary(entry: Entry, case: Case) -> dict[str, Any]:
    """Return moments of the posterior, of all parameters or many, and their worst errors."""
    start = clock()
    if entry.exact is not None:
        made = entry.exact(case.source)
    else:
        from benchmarks import zoo_references

        made = zoo_references.hmc(entry, case.in_memory())
    seconds, processor_seconds = clock() - start
    errors = {f"{n}_error": float((made[f"{n}_se"] / made["sd"]).max()) for n in ("mean", "sd")}
    if 3 * errors["mean_error"] > MEAN_TOLERANCE or 3 * errors["sd_error"] > entry.sd_tolerance:
        uncertain = f"{errors['mean_error']:.2g} sd and {errors['sd_error']:.1%}"
        return {"failed": f"the reference is {uncertain} uncertain"}
    at = compared(len(made["sd"]))
    return {
        "rows": case.source.n_rows,
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
    if contestant in LIBRARIES:
        importlib.import_module(LIBRARIES[contestant])
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
    missing = [model for model in MODELS if f"{model}: {REFERENCE}" not in found]
    without = f"\nModels not yet measured: {', '.join(missing)}.\n" if missing else ""
    limit = found["about"]["limit"]
    stopped = f"\nFits that were not right were stopped after {limit:g} processor seconds.\n"
    return {
        "models": _by_model(found, REFERENCE, REFERENCE_HEADS, _reference_cells) + without,
        **{name: _by_model(found, name, POLISH_HEADS, _polish_cells) for name in POLISHED},
        "zoo": _by_tool(found, _outcome) + stopped,
        "memory": _by_tool(found, lambda fit: f"{fit['peak_mb']:,.0f}" if "peak_mb" in fit else ""),
    }


def _by_model(found: Found, name: str, heads: str, cells: Callable[[str, dict], list]) -> str:
    """Return a table with a line for each model that has a result of one name."""
    fits = {model: found.get(f"{model}: {name}", {}) for model in MODELS}
    lines = [
        [model, fit["failed"]] if "failed" in fit else [model, *cells(model, fit)]
        for model, fit in fits.items()
        if fit
    ]
    return markdown(f"model | {heads}", lines)


def _by_tool(found: Found, tell: Callable[[dict], str]) -> str:
    """Return a table with a line for each model and a cell for each contestant."""

    def cells(model: str, _: dict) -> list[str]:
        fits = (found.get(f"{model}: {name}") for name in CONTESTANTS)
        return ["" if fit is None else tell(fit) for fit in fits]

    return _by_model(found, REFERENCE, " | ".join(CONTESTANTS), cells)


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

    names = [model for model in MODELS if f"{model}: {REFERENCE}" in found]
    shades = np.full((len(names), len(CONTESTANTS)), np.nan)
    figure = Figure(figsize=(9, 0.42 * len(names) + 1.5), layout="constrained")
    ax = figure.subplots()
    for (i, model), (j, tool) in product(enumerate(names), enumerate(CONTESTANTS)):
        if (fit := found.get(f"{model}: {tool}")) is not None:
            sd_error = fit.get("sd_error", 0.0) / MODELS[model].sd_tolerance
            worst = max(1.0, fit.get("mean_error", np.inf) / MEAN_TOLERANCE, sd_error)
            shades[i, j] = 0 if fit.get("right") else 1 + min(2.0, np.log10(worst))
            text = _outcome(fit).replace("*", "").replace(", ", "\n")
            ax.text(j, i, text, ha="center", va="center", fontsize=8)
    ax.imshow(shades, cmap="RdYlGn_r", vmin=-1.5, vmax=4.5, aspect="auto")
    ax.set_xticks(range(len(CONTESTANTS)), CONTESTANTS, fontsize=8)
    ax.set_yticks(range(len(names)), names)
    ax.xaxis.tick_top()
    figure.savefig(path, dpi=130)


def _table(name: str, data: Data, results: Path, **options: Any) -> str:
    """Return a table of what was measured, with the figure beside the results."""
    found = run(data, results=results, **options)
    if name == "zoo":
        plot(found, results.with_suffix(".png"))
    return tables(found)[name]


if __name__ == "__main__":
    names = "models", *POLISHED, "zoo", "memory"
    by_name = {name: partial(_table, name) for name in names}
    harness.measure(COMMAND, by_name, rows=0, fits=".*", limit=120.0, results=RESULTS)
