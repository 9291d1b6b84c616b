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
"""Solutions, eigenpairs and diagonals of a symmetric operator that is known by its products."""

from collections.abc import Callable

import numpy as np

from scipy.sparse.linalg import LinearOperator, cg

__all__ = ["Products"]

_STEPS = 40
"""Products that find the extreme directions."""

_SIGNS = 32
"""Random vectors of signs that estimate the diagonal."""

_MAX_PRODUCTS = 128
"""Products that solve for a vector, at most."""


class Products:
    """A precision of many parameters, which is known by its products with vectors.

    Directions that stand out are taken exactly, and the diagonal of the rest from random signs
    (Bekas, Kokiopoulou and Saad 2007).
    """

    def __init__(
        self,
        product: Callable[[np.ndarray], np.ndarray],
        size: int,
        rng: np.random.Generator,
    ):
        self.product = product
        values, vectors, errors = _eigenpairs(product, rng.normal(size=size))
        known = errors < 0.01 * np.abs(values)
        values, vectors = values[known], vectors[:, known]
        signs = rng.choice([-1.0, 1.0], (_SIGNS, size))
        rests = [v * (product(v) - vectors @ (values * (vectors.T @ v))) for v in signs]
        self.diagonal = vectors**2 @ values + np.mean(rests, axis=0)
        self.diagonal_error = np.std(rests, axis=0, ddof=1) / np.sqrt(_SIGNS)
        self._root = np.sqrt(np.where(self.diagonal > 0, self.diagonal, 1))
        self.values, self.vectors, self._errors = _eigenpairs(self._scaled, rng.normal(size=size))
        """Eigenpairs of the precision scaled to a diagonal of ones, the smallest value first."""
        self.concave = bool((self.diagonal > 0).all() and self.values[0] > 0)

    def inverse_diagonal(self) -> np.ndarray:
        """Return the diagonal of the inverse of the scaled precision.

        Other directions than those that stand out enter it by the mean of their values.
        """
        known = self._errors < 0.1 * np.abs(self.values)
        values, shares = self.values[known], self.vectors[:, known] ** 2
        rest = len(shares) - values.sum(), len(shares) - len(values)
        return shares @ (1 / values) + (1 - shares.sum(axis=1)) * rest[1] / rest[0]

    def solve(self, target: np.ndarray) -> np.ndarray:
        operator = LinearOperator(
            (len(target), len(target)), lambda v: self._scaled(np.ravel(v)), dtype="float64"
        )
        return cg(operator, target / self._root, rtol=1e-4, maxiter=_MAX_PRODUCTS)[0] / self._root

    def _scaled(self, v: np.ndarray) -> np.ndarray:
        return self.product(v / self._root) / self._root


def _eigenpairs(
    product: Callable[[np.ndarray], np.ndarray], start: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return approximate eigenvalues in order, vectors and errors, by Lanczos's method."""
    q, basis, diagonal, beside = start / np.linalg.norm(start), [], [], []
    while True:
        basis.append(q)
        w = product(q)
        diagonal.append(q @ w)
        for _ in range(2):  # one orthogonalization leaves rounding errors that grow
            for other in basis:
                w = w - (other @ w) * other
        rest = np.linalg.norm(w)
        if len(basis) == min(_STEPS, len(start)) or rest < 1e-6 * np.abs(diagonal).max():
            break
        beside.append(rest)
        q = w / rest
    values, vectors = np.linalg.eigh(np.diag(diagonal) + np.diag(beside, 1) + np.diag(beside, -1))
    return values, np.array(basis).T @ vectors, rest * np.abs(vectors[-1])
