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
"""Fit two models of the zoo to a hundred million rows each: 100,000 groups, and a mixture.

    python -m benchmarks.zoo_scale --folder scale --page docs/source/zoo.md

The synthetic rows are written once, in an order that no buffer repairs: group after group, and one
part of the mixture after the other.  ``preshuffle`` shuffles them, and ``polish`` starts from an
approximation that was not fitted, each in a process of its own.  All parameters are compared.
"""

import math
import shutil

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import zoo
from benchmarks.cases import Case, Data
from benchmarks.harness import about, in_process, load, markdown, measure, save
from benchmarks.zoo_exact import Moments, many_groups, mixture
from benchmarks.zoo_models import N_PLANE_MONTHS
from pymc.variational.streaming import parquet_source, preshuffle
from tests.variational.streaming.memory import peak_mb

COMMAND = "python -m benchmarks.zoo_scale"
RESULTS = Path("docs/source/results/scale.json")
WEIGHT, SIGMA, MU = 0.3, np.array([0.6, 1.0]), np.array([-0.7, 0.8])
"""Of the two parts of the mixture, which overlap."""


def groups_in_turn(n_rows: int, rng: np.random.Generator, numbers: np.ndarray) -> dict[str, Any]:
    levels = np.random.default_rng(1).normal(0.3, 0.5, N_PLANE_MONTHS)
    group, x = numbers * N_PLANE_MONTHS // n_rows, rng.normal(size=len(numbers))
    y = levels[group] + 0.5 * x + rng.normal(size=len(numbers))
    return {"group": group.astype("int32"), "x": x.astype("float32"), "y": y.astype("float32")}


def parts_in_turn(n_rows: int, rng: np.random.Generator, numbers: np.ndarray) -> dict[str, Any]:
    part = (numbers >= WEIGHT * n_rows).astype(int)
    return {"y": rng.normal(MU[part], SIGMA[part]).astype("float32")}


TRUTH = np.array([np.log(WEIGHT / (1 - WEIGHT)) / 2, *np.log(SIGMA), MU[0], np.log(MU[1] - MU[0])])
SCALED: dict[str, tuple[Callable[..., dict], Callable[..., Moments]]] = {
    "100,000 groups": (groups_in_turn, partial(many_groups, n_groups=N_PLANE_MONTHS)),
    "mixture": (parts_in_turn, partial(mixture, start=TRUTH)),
}


def scale(data: Data, results: Path) -> str:
    """Measure the models that were not measured with so many rows, and return a line for each."""
    found = load(results)
    for model in SCALED:
        if found.get(model, {}).get("rows") != data.n_rows:
            found |= {model: run(model, data), "about": about(*zoo.PACKAGES, "pyarrow")}
            save(found, results)
    return table(found)


def run(model: str, data: Data) -> dict[str, Any]:
    columns, exact = SCALED[model]
    ordered = data.of(f"{model} {data.n_rows}", data.n_rows, partial(columns, data.n_rows))
    shuffled = data.folder / f"{model} {data.n_rows} shuffled"
    shuffling = in_process(shuffle, ordered, shuffled)
    reference, seconds = in_process(refer, exact, ordered)
    fit = in_process(polished, model, shuffled, reference)
    shutil.rmtree(shuffled)
    n_parameters = len(reference["mean"])
    numbers = {"rows": data.n_rows, "parameters": n_parameters, "reference_seconds": seconds}
    return {**numbers, "preshuffle": shuffling, "polish": fit}


def shuffle(ordered: Path, shuffled: Path) -> dict[str, float]:
    start = zoo.clock()
    preshuffle(ordered, shuffled, seed=0, overwrite=True, progressbar=False)
    seconds, processor_seconds = zoo.clock() - start
    return {"seconds": seconds, "processor_seconds": processor_seconds, "peak_mb": peak_mb()}


def refer(exact: Callable[..., Moments], ordered: Path) -> tuple[dict[str, Any], float]:
    """Return the posterior of all rows, and the processor seconds that it took."""
    start, moments = zoo.clock(), exact(parquet_source(ordered))
    errors = {
        f"{name}_error": (moments[f"{name}_se"] / moments["sd"]).max() for name in ("mean", "sd")
    }
    return {**moments, **errors}, float((zoo.clock() - start)[1])


def polished(model: str, shuffled: Path, reference: dict[str, Any]) -> dict[str, Any]:
    case = Case(shuffled, zoo.MODELS[model].model)
    return zoo.measure(model, case, "polish", reference, math.inf)


def table(found: dict[str, Any]) -> str:
    """Return a line for each stage; seconds are of the clock, in brackets of all processors."""
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


if __name__ == "__main__":
    measure(COMMAND, {"scale": scale}, rows=100e6, results=RESULTS)
