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

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from scipy import stats

from pymc.variational._streaming.preshuffle.command import preshuffle
from pymc.variational._streaming.preshuffle.permute import (
    draw_labels,
    generator,
    group_rows,
    permute_rows,
)
from pymc.variational._streaming.preshuffle.piles import concatenate
from tests.variational.streaming.preshuffle.preshuffled import cut_small, rows_in_order

ALPHA = 1e-6


def two_passes(n_rows: int, n_piles: int, seed: int) -> list[int]:
    """Shuffle rows in memory as the tasks do on disk: each task, then each pile, by itself."""
    piles: list[list[pa.RecordBatch]] = [[] for _ in range(n_piles)]
    for task, rows in enumerate(np.array_split(np.arange(n_rows), 2)):
        batch = pa.record_batch({"row": rows})
        labels = draw_labels(generator(seed, 0, task), len(rows), n_piles)
        grouped, bounds = group_rows(batch, labels, n_piles)
        for pile in range(n_piles):
            piles[pile].append(grouped.slice(bounds[pile], bounds[pile + 1] - bounds[pile]))
    shuffled = []
    for number, pile in enumerate(piles):
        rows = [part for part in pile if part.num_rows]
        if rows:
            for part in permute_rows(concatenate(rows), generator(seed, 1, number), 2):
                shuffled += part["row"].to_pylist()
    return shuffled


def uniform(counts: np.ndarray) -> bool:
    """Whether the counts of equally likely outcomes are as even as they should be, not more."""
    expected = counts.sum() / counts.size
    statistic = ((counts - expected) ** 2 / expected).sum()
    low, high = stats.chi2.ppf([ALPHA / 2, 1 - ALPHA / 2], counts.size - 1)
    return low < statistic < high


@pytest.mark.parametrize("n_piles", [1, 2, 3, 7])
def test_all_permutations_of_five_rows_are_equally_likely(n_piles):
    """And so every position of every row, and of every pair of rows."""
    found = Counter(tuple(two_passes(5, n_piles, seed)) for seed in range(6000))
    assert len(found) == factorial(5)
    assert uniform(np.array(list(found.values())))


@pytest.mark.slow
def test_all_permutations_are_equally_likely_on_disk(tmp_path, monkeypatch):
    cut_small(monkeypatch.setattr, block=64, tasks=3)
    pq.write_table(pa.table({"row": range(4)}), tmp_path / "in.parquet", row_group_size=2)
    found: Counter = Counter()
    for seed in range(1200):
        report = preshuffle(
            tmp_path / "in.parquet",
            tmp_path / "out",
            seed=seed,
            overwrite=True,
            progressbar=False,
        )
        assert report.piles == 3
        found[tuple(rows_in_order(tmp_path / "out"))] += 1
    assert len(found) == factorial(4)
    assert uniform(np.array(list(found.values())))


N_ROWS = 200_000
"""Of `big`, in blocks of 10,000."""


@pytest.fixture(scope="module")
def big(tmp_path_factory) -> tuple[np.ndarray, np.ndarray]:
    """Shuffle many rows on disk; return where each went, and the sizes of the piles."""
    folder = tmp_path_factory.mktemp("big")
    table = pa.table({"row": np.arange(N_ROWS)})
    pq.write_table(table, folder / "in.parquet", row_group_size=10_000)
    with pytest.MonkeyPatch.context() as patch:
        cut_small(patch.setattr, block=1 << 16, tasks=64)
        report = preshuffle(folder / "in.parquet", folder / "out", seed=0, progressbar=False)
    assert report.piles == 64
    sizes = [pq.read_metadata(file).num_rows for file in sorted((folder / "out").iterdir())]
    return np.argsort(rows_in_order(folder / "out")), np.array(sizes)


def test_piles_are_of_random_sizes(big):
    """Piles of a fixed size would keep neighbours apart."""
    assert uniform(big[1])


def test_every_block_of_rows_is_spread_over_all_positions(big):
    table = np.histogram2d(np.arange(N_ROWS), big[0], bins=20)[0]
    expected = N_ROWS / 400
    low, high = stats.chi2.ppf([ALPHA / 2, 1 - ALPHA / 2], 19 * 19)
    assert low < ((table - expected) ** 2 / expected).sum() < high


@pytest.mark.parametrize("distance", [1, 2, 1000])
def test_rows_that_were_near_are_as_far_apart_as_any_two(big, distance):
    """Their new distance d has probability 2 (N - d) / (N (N - 1)); of disjoint pairs."""
    first = np.arange(N_ROWS).reshape(-1, 2, distance)[:, 0].ravel()
    apart = np.abs(big[0][first] - big[0][first + distance])
    edges = np.linspace(0, N_ROWS, 51)
    below = edges * (2 * N_ROWS - edges - 1) / (N_ROWS * (N_ROWS - 1))
    expected = len(apart) * np.diff(below)
    statistic = ((np.histogram(apart, edges)[0] - expected) ** 2 / expected).sum()
    low, high = stats.chi2.ppf([ALPHA / 2, 1 - ALPHA / 2], 49)
    assert low < statistic < high
    neighbours = np.count_nonzero(apart == 1)
    assert neighbours <= stats.poisson.ppf(1 - ALPHA, 2 * len(apart) / N_ROWS)


def test_neighbours_share_a_pile_as_often_as_any_two_rows(big):
    positions, sizes = big
    pile = np.searchsorted(np.cumsum(sizes), positions, side="right")
    together = np.count_nonzero(np.diff(pile) == 0)
    chance = (sizes.astype(float) ** 2).sum() / N_ROWS**2
    low, high = stats.binom.ppf([ALPHA / 2, 1 - ALPHA / 2], N_ROWS - 1, chance)
    assert low < together < high


@pytest.mark.parametrize("cure", ["fixed piles", "riffle"])
def test_the_tests_would_notice_a_worse_shuffle(cure):
    """What they are for: piles of one size, and dealing rows to piles in turn."""
    rng = np.random.default_rng(0)
    if cure == "fixed piles":
        labels = rng.permutation(np.arange(N_ROWS) % 64)
        assert not uniform(np.bincount(labels))
    else:
        labels = np.arange(N_ROWS) % 64
        together = np.count_nonzero(np.diff(labels) == 0)
        assert together < stats.binom.ppf(ALPHA / 2, N_ROWS - 1, 1 / 64)
