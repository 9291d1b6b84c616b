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
"""Each test has false-alarm rate `ALPHA`, for fixed seeds."""

from collections import Counter
from math import factorial
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from scipy import stats

from pymc.variational._streaming.preshuffle import passes
from pymc.variational.streaming import preshuffle
from tests.variational.streaming.preshuffle.preshuffled import cut_small, rows_in_order

ALPHA = 1e-6
N_ROWS = 200_000
N_PARTITIONS = 64
GROUP = 10_000
"""Rows of a row group, which are scattered by one task."""
SCHEMA = pa.schema({"row": pa.int64()})


def uniform(counts: np.ndarray, degrees: int | None = None) -> bool:
    """Whether the counts of equally likely outcomes are as even as they should be, not more."""
    expected = counts.sum() / counts.size
    statistic = ((counts - expected) ** 2 / expected).sum()
    low, high = stats.chi2.ppf([ALPHA / 2, 1 - ALPHA / 2], degrees or counts.size - 1)
    return low < statistic < high


class Balanced:
    """A generator that deals as many rows of each block to every partition."""

    def __init__(self, seed: int, *key: int):
        self._rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))
        self.permutation = self._rng.permutation

    def integers(self, low: int, high: int, size: int, dtype: type) -> np.ndarray:
        return self._rng.permutation(np.arange(size, dtype=dtype) % high)


@pytest.fixture
def balanced(monkeypatch):
    monkeypatch.setattr(passes, "_generator", Balanced)


def shuffle_four(folder, seed: int, n_partitions: int, block_bytes: int) -> tuple[int, ...]:
    """Shuffle four rows as tasks do: two scatter them, then each partition is permuted."""
    plan = SimpleNamespace(seed=seed, plain=SCHEMA, block_bytes=block_bytes, row_group_rows=2)
    paths = []
    for task, rows in enumerate(([0], [1, 2, 3])):
        paths.append(f"{folder}/{task}")
        labels = passes._generator(seed, passes._LABELS, task)
        batches = [pa.record_batch([pa.array([row])], SCHEMA) for row in rows]
        blocks = passes._join(batches, 1 << 10)
        passes._scatter_rows(paths[-1], blocks, n_partitions, labels)
    shuffled = []
    for partition in range(n_partitions):
        for batch in passes._shuffle(plan, paths, (partition,)):
            shuffled += batch["row"].to_pylist()
    return tuple(shuffled)


def count_permutations(
    folder, n_partitions: int, block_bytes: int = 1 << 10, n_seeds: int = 480
) -> np.ndarray:
    seeds = range(n_seeds)
    found = Counter(shuffle_four(folder, seed, n_partitions, block_bytes) for seed in seeds)
    return np.array([*found.values(), *[0] * (factorial(4) - len(found))])


@pytest.mark.parametrize("n_partitions, block_bytes", [(3, 1 << 10), (2, 1)], ids=str)
def test_all_permutations_are_equally_likely(tmp_path, n_partitions, block_bytes):
    """Also where partitions are larger than memory, and are scattered again."""
    assert uniform(count_permutations(tmp_path, n_partitions, block_bytes))


@pytest.mark.usefixtures("balanced")
def test_balanced_partitions_would_not_make_all_permutations_equally_likely(tmp_path):
    """This is what the test before is for."""
    assert not uniform(count_permutations(tmp_path, 3, n_seeds=120))


def shuffle_many(folder) -> tuple[np.ndarray, np.ndarray]:
    """Shuffle many rows on disk; return where each went, and the sizes of the partitions."""
    table = pa.table({"row": np.arange(N_ROWS)})
    pq.write_table(table, folder / "in.parquet", row_group_size=GROUP)
    with pytest.MonkeyPatch.context() as patch:
        cut_small(patch.setattr, block=1 << 16, tasks=N_PARTITIONS)
        report = preshuffle(folder / "in.parquet", folder / "out", seed=0, progressbar=False)
    assert report.piles == N_PARTITIONS
    sizes = [pq.read_metadata(file).num_rows for file in sorted((folder / "out").iterdir())]
    return np.argsort(rows_in_order(folder / "out")), np.array(sizes)


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    return shuffle_many(tmp_path_factory.mktemp("many"))


def neighbours_together(positions: np.ndarray, sizes: np.ndarray) -> tuple[int, float, float]:
    """Count neighbours in one partition; return the count, and its bounds if labels are random."""
    partition = np.searchsorted(np.cumsum(sizes), positions, side="right")
    chance = (sizes.astype(float) ** 2).sum() / N_ROWS**2
    low, high = stats.binom.ppf([ALPHA / 2, 1 - ALPHA / 2], N_ROWS - 1, chance)
    return np.count_nonzero(np.diff(partition) == 0), low, high


def test_partitions_are_of_random_sizes_and_keep_no_neighbours_apart(many):
    together, low, high = neighbours_together(*many)
    assert low < together < high
    assert uniform(many[1])


@pytest.mark.usefixtures("balanced")
def test_balanced_partitions_would_be_noticed_on_disk(tmp_path):
    positions, sizes = shuffle_many(tmp_path)
    assert sorted(positions) == list(range(N_ROWS))
    assert not uniform(sizes)


def test_every_order_of_five_neighbours_is_equally_likely(many):
    """Orders of rows that no two tuples share are independent."""
    orders = np.argsort(many[0].reshape(-1, 5), axis=1) @ 5 ** np.arange(5)
    counts = np.unique(orders, return_counts=True)[1]
    assert len(counts) == factorial(5)
    assert uniform(counts)


def test_every_block_of_rows_is_spread_over_all_positions(many):
    table = np.histogram2d(np.arange(N_ROWS), many[0], bins=20)[0]
    assert uniform(table, degrees=19 * 19)


@pytest.mark.parametrize("distance", [1, 1000])
def test_rows_that_were_near_are_as_far_apart_as_any_two(many, distance):
    """Their new distance d has probability 2 (N - d) / (N (N - 1)); of disjoint pairs."""
    first = np.arange(N_ROWS).reshape(-1, 2, distance)[:, 0].ravel()
    apart = np.abs(many[0][first] - many[0][first + distance])
    edges = np.linspace(0, N_ROWS, 51)
    below = edges * (2 * N_ROWS - edges - 1) / (N_ROWS * (N_ROWS - 1))
    expected = len(apart) * np.diff(below)
    statistic = ((np.histogram(apart, edges)[0] - expected) ** 2 / expected).sum()
    low, high = stats.chi2.ppf([ALPHA / 2, 1 - ALPHA / 2], 49)
    assert low < statistic < high
    neighbours = np.count_nonzero(apart == 1)
    assert neighbours <= stats.poisson.ppf(1 - ALPHA, 2 * len(apart) / N_ROWS)
