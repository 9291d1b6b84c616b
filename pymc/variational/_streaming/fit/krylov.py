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
"""Eigenpairs, solutions and diagonals of a symmetric operator that is known by its products."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np

__all__ = ["Matrix", "Products"]

_KRYLOV = 40
"""Hessian-vector products that find the extreme directions of many parameters."""

_MAX_KRYLOV = 128
"""Hessian-vector products of a Newton step of many parameters, at most."""

_SIGNS = 32
"""Random vectors of signs that estimate the diagonal of the Hessian of many parameters."""


class Products:
    """A precision of many parameters, which is known by its products with vectors."""

    def __init__(self, product: Callable[[np.ndarray], np.ndarray], size: int, rng):
        self.product = product
        self.diagonal, self.diagonal_error = _estimate_diagonal(product, size, rng)
        self._find_eigenpairs(rng)
        self.inverse_diagonal = _diagonal_of_inverse(self.ritz)
        """Diagonal of the inverse of the precision that is scaled to a diagonal of ones."""

    def _find_eigenpairs(self, rng) -> None:
        self._root = np.sqrt(np.where(self.diagonal > 0, self.diagonal, 1))
        self.ritz = _krylov(self._scaled, rng.normal(size=len(self._root)))
        self.concave = bool((self.diagonal > 0).all() and self.ritz.values[0] > 0)

    def _scaled(self, v: np.ndarray) -> np.ndarray:
        return self.product(v / self._root) / self._root

    def solve(self, target: np.ndarray) -> np.ndarray:
        return _solve_by_krylov(self._scaled, target / self._root) / self._root


class Matrix(Products):
    """The same where the whole matrix is known."""

    def __init__(self, matrix: np.ndarray, rng):
        self._matrix = (matrix + matrix.T) / 2
        self.product = partial(np.matmul, self._matrix)
        self.diagonal, self.diagonal_error = np.diag(self._matrix), np.zeros(len(matrix))
        self._find_eigenpairs(rng)
        self.concave &= bool(np.linalg.eigvalsh(self._matrix)[0] > 0)
        self.inverse_diagonal = _diagonal_of_inverse(self.ritz)
        if self.concave:
            self.inverse_diagonal = np.diag(np.linalg.inv(self._matrix)) * self.diagonal

    def solve(self, target: np.ndarray) -> np.ndarray:
        return np.linalg.solve(self._matrix, target)


class _Ritz(NamedTuple):
    """Approximate eigenpairs of a symmetric operator, the smallest value first."""

    values: np.ndarray
    vectors: np.ndarray
    products: np.ndarray
    """The operator times the vectors."""
    errors: np.ndarray
    """Norms of the residuals."""
    weights: np.ndarray
    """Weights of a Gauss quadrature of the spectrum."""


def _lanczos(product: Callable[[np.ndarray], np.ndarray], start: np.ndarray, n_steps: int):
    """Yield basis, tridiagonal matrix and residual norm after each step of Lanczos's method."""
    basis = [start / np.linalg.norm(start)]
    alphas: list[float] = []
    betas: list[float] = []
    for _ in range(min(n_steps, len(start))):
        w = product(basis[-1])
        alphas.append(float(basis[-1] @ w))
        for _ in range(2):  # twice is enough, in the words of Kahan and Parlett
            for q in basis:
                w = w - (q @ w) * q
        betas.append(float(np.linalg.norm(w)))
        tridiagonal = np.diag(alphas) + np.diag(betas[:-1], 1) + np.diag(betas[:-1], -1)
        yield basis, tridiagonal, betas[-1]
        if betas[-1] < 1e-10 * max(map(abs, alphas)):
            return
        basis.append(w / betas[-1])


def _krylov(product, start: np.ndarray, n_steps: int = _KRYLOV) -> _Ritz:
    for basis, tridiagonal, beta in _lanczos(product, start, n_steps):
        pass
    values, vectors = np.linalg.eigh(tridiagonal)
    q = np.array(basis[: len(values)]).T
    products = q @ tridiagonal
    if len(basis) > len(values):
        products[:, -1] += beta * basis[-1]
    return _Ritz(
        values, q @ vectors, products @ vectors, beta * np.abs(vectors[-1]), vectors[0] ** 2
    )


def _solve_by_krylov(product, target: np.ndarray) -> np.ndarray:
    """Solve for *target* by conjugate gradients in the form of Lanczos's method."""
    size = np.linalg.norm(target)
    if not size:
        return target
    for basis, tridiagonal, beta in _lanczos(product, target, _MAX_KRYLOV):
        y = size * np.linalg.solve(tridiagonal, np.eye(len(tridiagonal))[0])
        if beta * abs(y[-1]) < 1e-4 * size:
            break
    return np.array(basis[: len(y)]).T @ y


def _estimate_diagonal(product, size: int, rng) -> tuple[np.ndarray, np.ndarray]:
    """Return the diagonal of a symmetric operator, and standard errors.

    Directions that stand out are taken exactly, the rest from random signs (Bekas, Kokiopoulou
    and Saad 2007).
    """
    ritz = _krylov(product, rng.normal(size=size))
    chosen = np.argsort(-np.abs(ritz.values - np.median(ritz.values)))[: _KRYLOV // 2]
    vectors = ritz.vectors[:, chosen]
    exact = (vectors * ritz.products[:, chosen]).sum(axis=1)
    total, squares = np.zeros(size), np.zeros(size)
    for _ in range(_SIGNS):
        signs = rng.choice([-1.0, 1.0], size)
        w = product(signs)
        rest = signs * (w - vectors @ (vectors.T @ w))
        total, squares = total + rest, squares + rest**2
    mean = total / _SIGNS
    variance = np.maximum(squares / _SIGNS - mean**2, 0) / (_SIGNS - 1)
    return exact + mean, np.sqrt(variance)


def _diagonal_of_inverse(ritz: _Ritz) -> np.ndarray:
    """Estimate it from some eigenpairs.

    Vectors that are known enter the inverse one by one, and the others by their mean. Where all
    are known, values are repeated, and the heaviest most often.
    """
    known = ritz.errors < 0.1 * np.abs(ritz.values)
    shares = ritz.vectors[:, known] ** 2
    weights = ritz.weights * ~known + 1e-12 * ritz.weights**2
    others = np.average(1 / ritz.values, weights=weights)
    return shares @ (1 / ritz.values[known]) + (1 - shares.sum(axis=1)) * others
