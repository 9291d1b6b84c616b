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

"""Streams, and a model whose posterior is normal and known."""

import numpy as np

from scipy import stats

import pymc as pm

from pymc.variational.streaming import StreamingDataset

__all__ = ["Regression", "place", "position", "stream"]


def stream(rows, batch_size: int = 150, **kwargs) -> StreamingDataset:
    rows = np.asarray(rows, "float64")
    return StreamingDataset(
        rows if rows.ndim > 1 else rows[:, None], batch_size=batch_size, **kwargs
    )


def place(approx, mean, sd) -> None:
    """Give an approximation this mean, and standard deviations or a covariance."""
    shared = approx.groups[0].shared_params
    shared["mu"].set_value(np.atleast_1d(np.asarray(mean, "float64")))
    sd = np.atleast_1d(np.asarray(sd, "float64"))
    if sd.ndim == 1:
        shared["rho"].set_value(np.log(np.expm1(sd)))
    else:
        factor = np.linalg.cholesky(sd)
        np.fill_diagonal(factor, np.log(np.expm1(np.diag(factor))))
        shared["L_tril"].set_value(factor[np.tril_indices(len(sd))])


def position(approx) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and covariance of an approximation."""
    group = approx.groups[0]
    return tuple(x.eval(mode="FAST_COMPILE") for x in (group.mean, group.cov))


class Regression:
    """Normal likelihood with correlated columns; the posterior is normal and known."""

    n_rows = 1_011
    prior_sd, noise_sd = 5.0, 2.0

    def __init__(self, n_columns: int = 3):
        rng = np.random.default_rng(1)
        common = rng.normal(size=(self.n_rows, 1))
        x = common + 0.2 * rng.normal(size=(self.n_rows, n_columns))
        y = x @ np.arange(1.0, n_columns + 1) + self.noise_sd * rng.normal(size=self.n_rows)
        self.rows = np.column_stack([x, y])
        self.precision = x.T @ x / self.noise_sd**2 + np.eye(n_columns) / self.prior_sd**2
        self.covariance = np.linalg.inv(self.precision)
        self.mean = self.covariance @ x.T @ y / self.noise_sd**2
        self.sd = np.sqrt(np.diag(self.covariance))
        """Of the posterior."""
        self.mean_field_sd = np.diag(self.precision) ** -0.5
        self.evidence = (
            stats.norm(x @ self.mean, self.noise_sd).logpdf(y).sum()
            + stats.norm(0, self.prior_sd).logpdf(self.mean).sum()
            - stats.multivariate_normal(self.mean, self.covariance).logpdf(self.mean)
        )

    def model(self, ds, total_size=None) -> pm.Model:
        buf = ds.as_tensor()
        n_columns = len(self.mean)
        with pm.Model() as model:
            b = pm.Normal("b", 0, self.prior_sd, shape=n_columns)
            pm.Normal(
                "y",
                buf[:, :n_columns] @ b,
                self.noise_sd,
                observed=buf[:, n_columns],
                total_size=total_size or ds.total_size,
            )
        return model
