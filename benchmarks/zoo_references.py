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
"""References of the zoo: HMC of NumPyro, with control variates.

They share no code with what is measured but the density of PyMC's model, in JAX.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytensor
import pytensor.tensor as pt
import scipy.optimize

from numpyro.infer import HMC, MCMC
from pytensor.graph.replace import clone_replace

import pymc as pm

from benchmarks.zoo_exact import Moments
from benchmarks.zoo_models import N_DEST, Entry
from pymc.pytensorf import join_nonshared_inputs

__all__ = ["hmc", "log_density"]

MOST_OFF = 10.0
"""Standard errors of a mean score from zero that chains of a hundred values may have."""

jax.config.update("jax_enable_x64", True)


def log_density(build: Callable[..., object], n_rows: int) -> tuple[Any, np.ndarray]:
    """Return PyMC's log density of all unconstrained values, as a function of JAX, and a start.

    The function takes one vector, the two parts of rows, and for how many of the *n_rows* rows each
    of them stands.
    """
    x, y, weight = pt.matrix("x"), pt.vector("y"), pt.vector("weight")
    rows = pytensor.shared(np.zeros((1, 1))), pytensor.shared(np.zeros(1))
    with pm.Model() as model:
        build(*rows, n_rows)
    start = model.initial_point(0)
    prior = model.logp([*model.free_RVs, *model.potentials])
    (likelihood,) = model.logp(model.observed_RVs, sum=False)
    weighted = likelihood * weight * (rows[1].shape[0] / n_rows)  # it is scaled by total_size
    logp, flat = join_nonshared_inputs(start, [prior + weighted.sum()], model.value_vars)
    logp = clone_replace(logp, dict(zip(rows, (x, y))))
    inputs = [flat, x, y, weight]
    compiled = pytensor.function(inputs, logp, mode="JAX", on_unused_input="ignore")
    point = np.concatenate([np.ravel(start[v.name]) for v in model.value_vars])
    return lambda *values: compiled.vm.jit_fn(*values)[0], point


def hmc(entry: Entry, rows: np.ndarray) -> Moments:
    """Sample the posterior, levels of groups in coordinates in which they are round."""
    of_rows, start = log_density(entry.model, len(rows))
    n = N_DEST if entry.levels else 0
    kept, counts = np.unique(rows, axis=0, return_counts=True)
    distinct = [*map(jnp.asarray, (kept[:, :-1], kept[:, -1], counts.astype(float)))]

    def density(z: Any) -> Any:
        return of_rows(z, *distinct)

    def centred(u: Any) -> Any:
        """Return mean, log of the spread and levels from values in which they are independent."""
        u = jnp.asarray(u)
        return u.at[2 : 2 + n].set(u[0] + jnp.exp(u[1]) * u[2 : 2 + n])

    def non_centred(x: Any) -> Any:
        return x.at[2 : 2 + n].set((x[2 : 2 + n] - x[0]) / jnp.exp(x[1]))

    def sampled(x: Any) -> Any:
        return density(non_centred(x)) - n * x[1] if entry.levels == "non-centred" else density(x)

    # A mode exists without centring only, but levels of many rows are round with it.
    mode = _mode(lambda u: sampled(centred(u)) + n * u[1], start)
    z, n_chains = _chains(sampled, centred(mode), draws=1_200 if entry.levels else 100)
    if entry.levels == "non-centred":
        z = jax.vmap(non_centred)(z)
    return _moments(np.asarray(z), density, n_chains)


def _mode(density: Any, start: np.ndarray) -> np.ndarray:
    """Return the place of a maximum near the start."""
    scale = -float(np.abs(density(start)))
    both = jax.jit(jax.value_and_grad(lambda z: density(z) / scale))
    hessp = jax.jit(lambda z, v: jax.jvp(jax.grad(density), (z,), (v,))[1] / scale)
    return scipy.optimize.minimize(
        lambda z: tuple(map(np.asarray, both(z))),
        start,
        jac=True,
        hessp=lambda z, v: np.asarray(hessp(z, v)),
        method="trust-ncg",
        options={"maxiter": 300, "gtol": 1e-9},
    ).x


def _chains(density: Any, centre: Any, draws: int) -> tuple[Any, int]:
    """Return draws in coordinates in which the density is round at *centre*, and the chains."""
    root = _root_of_covariance(density, centre)
    kernel = HMC(
        potential_fn=lambda v: -density(centre + root @ v),
        trajectory_length=np.pi / 2,  # a quarter of the period of a round normal density
        adapt_mass_matrix=False,
    )
    n_chains = 8 if len(centre) < 30 else 16
    sampler = MCMC(
        kernel,
        num_warmup=100,
        num_samples=draws,
        num_chains=n_chains,
        chain_method="vectorized",
        progress_bar=False,
    )
    begin = np.random.default_rng(0).normal(size=(n_chains, len(centre)))
    sampler.run(jax.random.key(0), init_params=jnp.asarray(begin))
    return sampler.get_samples() @ root.T + centre, n_chains


def _root_of_covariance(density: Any, z: np.ndarray) -> np.ndarray:
    """Return a root of the inverse of the curvature, where that is positive and not flat."""
    curvature = jax.jit(lambda v: -jax.jvp(jax.grad(density), (z,), (v,))[1])
    hessian = np.array([curvature(v) for v in np.eye(len(z))])
    values, vectors = np.linalg.eigh((hessian + hessian.T) / 2)
    return vectors / np.sqrt(np.maximum(abs(values), 0.1))


def _moments(z: np.ndarray, density: Any, n_chains: int) -> Moments:
    """Return means and standard deviations of draws, and the standard errors of both.

    The score has the mean zero, and its product with a value that of minus one; both are control
    variates, which leave no error for a normal density (Mira, Solgi and Imparato 2013).
    """
    score = np.asarray(jax.lax.map(jax.grad(density), z))
    chains = score.reshape(n_chains, -1, z.shape[1]).mean(axis=1)
    off = abs(chains.mean(axis=0)) / (chains.std(axis=0, ddof=1) / np.sqrt(n_chains))
    if off.max() > MOST_OFF:
        raise RuntimeError(
            f"the chains have not converged: the mean score is {off.max():.0f} se off"
        )
    mean, mean_se = np.transpose([_controlled(values, score) for values in z.T])
    variance, variance_se = np.transpose(
        [
            _controlled((values - m) ** 2, np.hstack([score, score * (values - m)[:, None] + unit]))
            for values, m, unit in zip(z.T, mean, np.eye(z.shape[1]))
        ]
    )
    sd = np.sqrt(variance)
    return {"mean": mean, "sd": sd, "mean_se": mean_se, "sd_se": variance_se / 2 / sd}


def _controlled(values: np.ndarray, controls: np.ndarray) -> tuple[float, float]:
    """Return the mean of draws, corrected by variates whose mean is zero, and its error."""
    centred = controls - controls.mean(axis=0)
    rest = values - controls @ np.linalg.solve(centred.T @ centred, centred.T @ values)
    batches = [part.mean() for part in np.array_split(rest, 32)]
    return float(rest.mean()), float(np.std(batches, ddof=1) / np.sqrt(len(batches)))
