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
"""Likelihoods that a stream takes without a word, on rows that are right for them."""

import numpy as np
import pytensor
import pytensor.tensor as pt
import pytest

from pytensor.link.c.op import COp

import pymc as pm

from pymc.variational.streaming import StreamError, StreamingDataset

MODE = pytensor.config.mode
N = 40
COLUMNS = ("x", "z", "binary", "count", "group", "positive", "share", "level", "trials")


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    rng = np.random.default_rng(0)
    trials = rng.integers(5, 9, N)
    columns = [
        *(rng.normal(size=N), rng.normal(size=N), rng.integers(0, 2, N), rng.poisson(2.0, N)),
        *(rng.integers(0, 5, N), rng.gamma(2.0, size=N), rng.beta(2, 3, N)),
        *(rng.integers(0, 3, N), trials),
    ]
    counts = rng.multinomial(6, [0.2, 0.3, 0.5], N)
    return np.column_stack([*columns, counts, counts / 6 * 0.97 + 0.01])


def effect(c):
    return pm.Normal("b") * c["x"]


def normal(c, mean, **kwargs):
    return pm.Normal("y", mean, 1, observed=c["z"], **kwargs)


def lkj(c, kw):
    chol, _, _ = pm.LKJCholeskyCov("chol", n=2, eta=2, sd_dist=pm.HalfNormal.dist())
    pm.MvNormal("y", pm.Normal("m", shape=2), chol=chol, observed=c["buf"][:, :2], **kw)


def network(c, kw):
    hidden = pt.tanh(c["buf"][:, :2] @ pm.Normal("w", shape=(2, 4)))
    normal(c, hidden @ pm.Normal("v", shape=4), **kw)


def relu(c, kw):
    hidden = pt.maximum(c["buf"][:, :2] @ pm.Normal("w", shape=(2, 4)), 0)
    normal(c, pt.switch(hidden > 1, hidden, 0.1 * hidden).sum(axis=-1), **kw)


def stacked(c, kw):
    index = pt.stack([c["group"], c["level"]], axis=1).astype("int64")
    normal(c, pm.Normal("g", shape=(5, 3))[index[:, 0], index[:, 1]], **kw)


def one_hot(c, kw):
    columns = pt.eq(c["group"].astype("int64")[:, None], np.arange(5)).astype("float64")
    normal(c, columns @ pm.Normal("g", shape=5), **kw)


def hurdle(c, kw):
    def logp(value, p, rate):
        truncated = pm.logp(pm.Poisson.dist(rate), value) - pt.log1mexp(-rate)
        return pt.switch(pt.eq(value, 0), pt.log1p(-p), pt.log(p) + truncated)

    p, rate = pm.math.invlogit(effect(c)), pm.HalfNormal("rate")
    pm.CustomDist("y", p, rate, logp=logp, observed=c["count"].astype("int64"), **kw)


def by_categorical(c, kw):
    """Each row takes the probability of its own category, as in a likelihood written by hand."""
    p = pt.special.softmax(pt.outer(c["x"], pm.Normal("b", shape=5)), axis=-1)
    rows = pt.arange(c["x"].shape[0])

    def logp(value, p):
        return pt.log(p[rows, value.astype("int64")])

    pm.CustomDist("y", p, logp=logp, signature="(k)->()", observed=c["group"], **kw)


def weighted(c, kw):
    def logp(value, mean, weight):
        return weight * pm.logp(pm.Normal.dist(mean, 1), value)

    pm.CustomDist("y", effect(c), c["positive"], logp=logp, observed=c["z"], **kw)


SILENT = {
    "Normal": lambda c, kw: normal(c, effect(c), **kw),
    "StudentT": lambda c, kw: pm.StudentT("y", nu=3, mu=effect(c), sigma=1, observed=c["z"], **kw),
    "heteroscedastic": lambda c, kw: pm.Normal(
        "y", 0, pm.math.exp(effect(c)), observed=c["z"], **kw
    ),
    "Gamma": lambda c, kw: pm.Gamma("y", 2, pm.math.exp(effect(c)), observed=c["positive"], **kw),
    "Beta": lambda c, kw: pm.Beta("y", 2, pm.math.exp(effect(c)), observed=c["share"], **kw),
    "Uniform with a parameter": lambda c, kw: pm.Uniform(
        "y", 0, 9 + pm.HalfNormal("u"), observed=c["positive"], **kw
    ),
    "Bernoulli": lambda c, kw: pm.Bernoulli("y", logit_p=effect(c), observed=c["binary"], **kw),
    "Binomial": lambda c, kw: pm.Binomial(
        "y", c["trials"], logit_p=effect(c), observed=c["level"], **kw
    ),
    "BetaBinomial": lambda c, kw: pm.BetaBinomial(
        "y", pm.math.exp(effect(c)), 2, c["trials"].astype("int64"), observed=c["level"], **kw
    ),
    "Poisson with exposure": lambda c, kw: pm.Poisson(
        "y", c["positive"] * pm.math.exp(effect(c)), observed=c["count"], **kw
    ),
    "NegativeBinomial": lambda c, kw: pm.NegativeBinomial(
        "y", mu=pm.math.exp(effect(c)), alpha=2, observed=c["count"], **kw
    ),
    "ZeroInflatedPoisson": lambda c, kw: pm.ZeroInflatedPoisson(
        "y", 0.7, pm.math.exp(effect(c)), observed=c["count"], **kw
    ),
    "ZeroInflatedNegativeBinomial": lambda c, kw: pm.ZeroInflatedNegativeBinomial(
        "y", psi=0.7, mu=pm.math.exp(effect(c)), alpha=2, observed=c["count"], **kw
    ),
    "HurdleGamma": lambda c, kw: pm.HurdleGamma(
        "y", 0.7, 2, pm.math.exp(effect(c)), observed=c["positive"] * c["binary"], **kw
    ),
    "hurdle by hand": hurdle,
    "Categorical": lambda c, kw: pm.Categorical(
        "y", logit_p=pt.outer(c["x"], pm.Normal("b", shape=5)), observed=c["group"], **kw
    ),
    "categorical by hand": by_categorical,
    "OrderedLogistic": lambda c, kw: pm.OrderedLogistic(
        "y", eta=effect(c), cutpoints=np.array([-1.0, 1.0]), observed=c["level"], **kw
    ),
    "OrderedProbit with cutpoints": lambda c, kw: pm.OrderedProbit(
        "y",
        eta=effect(c),
        cutpoints=pm.Normal(
            "cut", [-1, 1], 1, shape=2, transform=pm.distributions.transforms.ordered
        ),
        observed=c["level"],
        **kw,
    ),
    "Censored": lambda c, kw: pm.Censored(
        "y", pm.Normal.dist(effect(c)), -1, 1, observed=pt.clip(c["z"], -1, 1), **kw
    ),
    "Censored by row": lambda c, kw: pm.Censored(
        "y",
        pm.Normal.dist(effect(c)),
        None,
        c["positive"],
        observed=pt.minimum(c["z"], c["positive"]),
        **kw,
    ),
    "Truncated": lambda c, kw: pm.Truncated(
        "y", pm.Normal.dist(effect(c)), lower=0, observed=c["positive"], **kw
    ),
    "Truncated counts": lambda c, kw: pm.Truncated(
        "y", pm.Poisson.dist(pm.math.exp(effect(c))), lower=1, observed=c["count"] + 1, **kw
    ),
    "NormalMixture": lambda c, kw: pm.NormalMixture(
        "y", pm.Dirichlet("w", np.ones(2)), pm.Normal("m", shape=2), observed=c["z"], **kw
    ),
    "mixture of kinds": lambda c, kw: pm.Mixture(
        "y",
        pm.Dirichlet("w", np.ones(2)),
        [pm.Normal.dist(effect(c), 1), pm.StudentT.dist(nu=3, mu=0, sigma=2)],
        observed=c["z"],
        **kw,
    ),
    "Multinomial": lambda c, kw: pm.Multinomial(
        "y", 6, pm.Dirichlet("p", np.ones(3)), observed=c["buf"][:, 9:12], **kw
    ),
    "DirichletMultinomial": lambda c, kw: pm.DirichletMultinomial(
        "y",
        n=c["buf"][:, 9:12].sum(axis=1).astype("int64"),
        a=pm.HalfNormal("a", shape=3),
        observed=c["buf"][:, 9:12],
        **kw,
    ),
    "Dirichlet": lambda c, kw: pm.Dirichlet(
        "y", pm.HalfNormal("a", shape=3), observed=c["buf"][:, 12:15], **kw
    ),
    "MvNormal": lambda c, kw: pm.MvNormal(
        "y", pt.outer(c["x"], pm.Normal("m", shape=2)), np.eye(2), observed=c["buf"][:, :2], **kw
    ),
    "LKJ": lkj,
    "covariance by row": lambda c, kw: pm.MvNormal(
        "y",
        pm.Normal("m", shape=2),
        np.eye(2) * (1 + c["binary"])[:, None, None],
        observed=c["buf"][:, :2],
        **kw,
    ),
    "neural network": network,
    "network with switches": relu,
    "weighted": weighted,
    "walk along the columns": lambda c, kw: pm.GaussianRandomWalk(
        "y", sigma=pm.HalfNormal("s"), init_dist=pm.Normal.dist(), observed=c["buf"][:, :3], **kw
    ),
    "groups": lambda c, kw: normal(c, pm.Normal("g", shape=5)[c["group"].astype("int64")], **kw),
    "groups from the end": lambda c, kw: normal(
        c, pm.Normal("g", shape=5)[-c["group"].astype("int64")], **kw
    ),
    "groups in regions": lambda c, kw: normal(
        c, pm.Normal("r", shape=2)[pt.as_tensor([0, 1, 1, 0, 1])[c["group"].astype("int64")]], **kw
    ),
    "group and time": lambda c, kw: normal(
        c, pm.Normal("g", shape=15)[(3 * c["group"] + c["level"]).astype("int64")], **kw
    ),
    "two indices": stacked,
    "slope by group": lambda c, kw: normal(
        c, pm.Normal("g", shape=(5, 2))[c["group"].astype("int64")][:, 1] * c["x"], **kw
    ),
    "dummies": one_hot,
    "bins by floor": lambda c, kw: normal(
        c, pm.Normal("g", shape=10)[pt.floor(10 * c["share"]).astype("int64")], **kw
    ),
    "comparison as a dummy": lambda c, kw: normal(
        c, (c["x"] > 0).astype("int64") * pm.Normal("b"), **kw
    ),
    "a code that is replaced": lambda c, kw: normal(
        c, pt.switch(pt.eq(c["count"], 3), pm.Normal("m"), c["x"]), **kw
    ),
    "weights that are all one": lambda c, kw: normal(c, effect(c) * np.ones(10), **kw),
}


@pytest.mark.parametrize("name", SILENT)
@pytest.mark.filterwarnings("error")
def test_it_is_accepted_with_all_of_its_rows_without_waiting_for_a_c_compiler(
    name, rows, monkeypatch
):
    monkeypatch.setattr(pytensor.config, "cxx", "g++")
    monkeypatch.setattr(COp, "make_c_thunk", None)
    with StreamingDataset(rows, batch_size=10, order_check="off", prefetch=False) as ds, pm.Model():
        columns = {name: ds.as_tensor()[:, i] for i, name in enumerate(COLUMNS)}
        SILENT[name]({"buf": ds.as_tensor(), **columns}, {"total_size": ds.total_size})
        callback = ds.fit_callback()
        while ds.rows_seen < N:
            ds.advance()
        del callback


@pytest.mark.parametrize(
    "tie",
    [pt.cumsum, lambda x: x[::-1], lambda x: pt.roll(x, 1), lambda x: pt.set_subtensor(x[0], 0)],
    ids=["sum", "reverse", "roll", "first"],
)
@pytest.mark.parametrize("batch_size", [2, 3, 4])
def test_ties_within_small_batches_are_refused(batch_size, tie):
    rows = np.random.default_rng(0).normal(size=(12, 2))
    with StreamingDataset(rows, batch_size=batch_size) as ds, pm.Model():
        buf = ds.as_tensor()
        pm.Normal("y", pm.Normal("b") * tie(buf[:, 0]), observed=buf[:, 1], total_size=12)
        with pytest.raises(StreamError, match="'y' ties the rows of a batch together"):
            ds.fit_callback()
