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
"""Contestants of the zoo: what fits a model, as a user of that tool would call it.

Each yields estimates, as functions that return the moments of all unconstrained values; the time
that an estimate takes to be called does not count.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pytensor

import pymc as pm

from benchmarks import zoo_models as models
from benchmarks.cases import Case, stream
from pymc.variational.streaming import CheckNoiseFloor, FitReport, polish

__all__ = ["CONTESTANTS", "LIBRARIES", "STATSMODELS", "Moments"]

LEARNING_RATE, MOST_STEPS = 0.02, 20_000


class Moments(NamedTuple):
    """What an estimate says of the posterior."""

    mean: np.ndarray
    sd: np.ndarray
    report: FitReport | None = None


Estimates = Iterator[Callable[[], Moments]]


def _parts(case: Case) -> tuple[np.ndarray, np.ndarray]:
    rows = case.in_memory()
    return rows[:, :-1].copy(), rows[:, -1].copy()


def _pymc(case: Case) -> Estimates:
    """Fit random batches from memory."""
    parts = _parts(case)
    shared = (pytensor.shared(part, borrow=True) for part in parts)
    with pm.Model():
        x, y = pm.Minibatch(*shared, batch_size=case.batch_size)
        case.model(x, y, len(parts[1]))
        inference = pm.ADVI(random_seed=0)
        inference.fit(1_000, obj_optimizer=_adam(), progressbar=False)
        while True:  # in turns, each a quarter of what was before
            yield lambda: Moments(inference.approx.mean.eval(), inference.approx.std.eval())
            inference.refine(max(500, len(inference.hist) // 4), progressbar=False)


def _polished(case: Case, max_steps: int) -> Estimates:
    """Fit a stream until its noise floor, if at all, and polish it."""
    ds = stream(case)
    with pm.Model():
        case.observe(ds.as_tensor(), ds.total_size)
        inference = pm.ADVI(random_seed=0)
        if max_steps:
            callbacks = [CheckNoiseFloor(), ds.fit_callback()]
            inference.fit(max_steps, callbacks=callbacks, obj_optimizer=_adam(), progressbar=False)
        report = polish(inference.approx, ds, progressbar=False)
    yield lambda: Moments(inference.approx.mean.eval(), report.sd, report)


def _adam() -> Any:
    return pm.adam(learning_rate=LEARNING_RATE)


def _numpyro(case: Case) -> Estimates:
    """Fit random batches from memory with SVI, in float64, at a falling learning rate."""
    import jax
    import numpyro

    from numpyro.infer import SVI, Trace_ELBO, autoguide, init_to_value

    from benchmarks.zoo_references import log_density

    jax.config.update("jax_compilation_cache_dir", str(case.rows.parent / "jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    x, y = map(jax.numpy.asarray, _parts(case))
    density, start = log_density(case.model, len(y))
    n_rows = len(y)
    any_value = numpyro.distributions.ImproperUniform(
        numpyro.distributions.constraints.real_vector, (), event_shape=start.shape
    )

    def model(x: Any, y: Any) -> None:
        weights = np.full(len(y), n_rows / len(y))
        numpyro.factor("density", density(numpyro.sample("z", any_value), x, y, weights))

    begin = init_to_value(values={"z": start})
    guide = autoguide.AutoMultivariateNormal(model, init_loc_fn=begin)
    optimizer = numpyro.optim.Adam(lambda i: 0.02 / (1 + i / 1_000) ** 0.75)
    svi = SVI(model, guide, optimizer, Trace_ELBO())

    def step(state: Any, key: Any) -> Any:
        index = jax.random.randint(key, (case.batch_size,), 0, len(y))
        return svi.update(state, x[index], y[index])

    run = jax.jit(lambda state, keys: jax.lax.scan(step, state, keys)[0])
    state, done = svi.init(jax.random.key(0), x[: case.batch_size], y[: case.batch_size]), 0
    for turn in range(10**6):
        for key in jax.random.split(jax.random.key(turn + 1), max(1, done // 4 // 500)):
            state, done = run(state, jax.random.split(key, 500)), done + 500
        normal = guide.get_posterior(svi.get_params(state))
        yield partial(lambda q: Moments(q.mean, np.sqrt(q.variance)), normal)


def _statsmodels(case: Case) -> Estimates:
    """Fit by maximum likelihood where there is the model; priors are weak beside the rows."""
    from statsmodels import api

    x, y = _parts(case)
    found = STATSMODELS[case.model](api, np.column_stack([np.ones(len(y)), x]), y)
    yield lambda: found


def _logit(sm: Any, x: np.ndarray, y: np.ndarray) -> Moments:
    fit = sm.Logit(y, x).fit(disp=0, maxiter=100)
    return Moments(fit.params, fit.bse)


def _logit_of_dummies(sm: Any, x: np.ndarray, y: np.ndarray) -> Moments:
    dummies = np.eye(16)[x[:, 1].astype(int)][:, 1:]
    return _logit(sm, np.column_stack([x[:, [0, 2, 3, 4]], dummies]), y)


def _negative_binomial(sm: Any, x: np.ndarray, y: np.ndarray) -> Moments:
    fit = sm.NegativeBinomial(y, x).fit(disp=0, maxiter=200)
    mean, sd = fit.params.copy(), fit.bse.copy()
    mean[-1], sd[-1] = -np.log(mean[-1]), sd[-1] / mean[-1]
    return Moments(mean, sd)


def _zero_inflated(sm: Any, x: np.ndarray, y: np.ndarray) -> Moments:
    fit = sm.ZeroInflatedPoisson(y, x, exog_infl=x[:, :2]).fit(disp=0, maxiter=500)
    return Moments(np.concatenate([-fit.params[:2], fit.params[2:]]), fit.bse)


def _hurdle(sm: Any, x: np.ndarray, y: np.ndarray) -> Moments:
    wet, line = _logit(sm, x, y > 0), sm.OLS(np.log(y[y > 0]), x[y > 0]).fit()
    mean = np.concatenate([wet.mean, line.params, [np.log(line.scale) / 2]])
    return Moments(mean, np.concatenate([wet.sd, line.bse, [np.sqrt(0.5 / line.nobs)]]))


def _student_t(sm: Any, x: np.ndarray, y: np.ndarray) -> Moments:
    from statsmodels.miscmodels.tmodel import TLinearModel

    fit = TLinearModel(y, x).fit(disp=0, maxiter=2_000)
    mean, sd = np.array(fit.params)[[0, 1, 2, 4, 3]], np.array(fit.bse)[[0, 1, 2, 4, 3]]
    return Moments(np.append(mean[:3], np.log(mean[3:])), np.append(sd[:3], sd[3:] / mean[3:]))


def _ordinal(sm: Any, x: np.ndarray, y: np.ndarray) -> Moments:
    from statsmodels.miscmodels.ordinal_model import OrderedModel

    fit = OrderedModel(y.astype(int), x[:, 1:], distr="logit").fit(method="bfgs", disp=0)
    return Moments(np.array(fit.params), np.array(fit.bse))


STATSMODELS: dict[Callable, Callable[..., Moments]] = {
    models.logistic: _logit,
    models.dummies: _logit_of_dummies,
    models.negative_binomial: _negative_binomial,
    models.zero_inflated: _zero_inflated,
    models.hurdle: _hurdle,
    models.student_t: _student_t,
    models.ordinal: _ordinal,
}

CONTESTANTS: dict[str, Callable[[Case], Estimates]] = {
    "PyMC, Adam": _pymc,
    "ADVI, then polish": partial(_polished, max_steps=MOST_STEPS),
    "polish": partial(_polished, max_steps=0),
    "NumPyro, AutoMVN": _numpyro,
    "statsmodels": _statsmodels,
}
LIBRARIES = {"NumPyro, AutoMVN": "numpyro.infer", "statsmodels": "statsmodels.api"}
"""What is imported before the time of a fit begins."""
