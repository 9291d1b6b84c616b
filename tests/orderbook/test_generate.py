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

import filecmp

import numpy as np
import pytest

from benchmarks.harness import run_command
from benchmarks.orderbook import fold as fold_module
from benchmarks.orderbook import generate as generate_module
from benchmarks.orderbook import reading as reading_module
from benchmarks.orderbook.book import LEVEL, SNAPSHOT, close_ms
from benchmarks.orderbook.fold import fold
from benchmarks.orderbook.generate import generate, plan, simulate
from benchmarks.orderbook.reading import find_files, read_parts
from tests.orderbook.naive import NaiveBook, anova_f, as_float32, naive_rows, read_lines
from tests.orderbook.wire import assert_equal_rows, read_rows


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Eight thousand messages in both formats, and their rows."""
    directory = tmp_path_factory.mktemp("small")
    for file_format in ("json", "parquet"):
        messages, rows = directory / file_format, directory / f"{file_format}-rows"
        options = [
            "--messages",
            "8_000",
            "--seed",
            "3",
            "--format",
            file_format,
            "--no-progressbar",
        ]
        run_command(generate, [str(messages), *options])
        assert fold(messages, rows, progressbar=False).clock_set_back == 0
    return directory


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Rows of half a million messages as an array of four columns."""
    directory = tmp_path_factory.mktemp("large")
    messages = directory / "messages"
    generate(messages, messages=500_000, seed=0, format="parquet", progressbar=False)
    fold(messages, directory / "rows", progressbar=False)
    table = read_rows(directory / "rows")
    return np.column_stack([column.to_numpy().astype(float) for column in table.columns])


def all_messages(directory):
    for file in find_files(directory):
        yield file.parent.name, read_lines(file)


def same_files(one, other):
    names = [str(path.relative_to(one)) for path in one.rglob("*") if path.is_file()]
    assert names
    assert len(names) == sum(path.is_file() for path in other.rglob("*"))
    return filecmp.cmpfiles(one, other, names, shallow=False)[0] == names


def test_same_seed_gives_the_same_bytes(small, tmp_path):
    generate(tmp_path / "same", messages=8_000, seed=3, progressbar=False)
    generate(tmp_path / "other", messages=8_000, seed=4, progressbar=False)
    assert same_files(small / "json", tmp_path / "same")
    assert not same_files(small / "json", tmp_path / "other")


def test_a_second_snapshot_shows_a_book_that_went_on_unseen(small):
    """Only where it does can a fold that ignores second snapshots be caught."""
    n_changed = 0
    for _, messages in all_messages(small / "json"):
        book = NaiveBook()
        for message in messages[:-1]:
            kind, body = message["event"]["type"], message["event"]["msg"]
            before = dict(book.sizes)
            if kind == "orderbook_snapshot":
                book.snapshot(body)
                n_changed += any(before.values()) and before != book.sizes
            elif kind == "orderbook_delta":
                book.delta(body)
    assert n_changed == 1


def test_json_and_parquet_messages_fold_to_the_same_rows(small):
    assert same_files(small / "json-rows", small / "parquet-rows")


def test_rows_are_those_of_the_dictionary_merged_by_time(small):
    """The dictionary book refuses negative sizes; no book may be crossed or one-sided."""
    rows = []
    for market, messages in all_messages(small / "json"):
        made, dropped = naive_rows(messages, close_ms(market))
        assert dropped["one_sided"] == dropped["crossed"] == 0
        assert dropped["after_close"] == 3
        rows += made
    rows.sort(key=lambda row: row[0])
    assert_equal_rows(read_rows(small / "json-rows"), *as_float32(rows))


def test_rows_do_not_depend_on_block_sizes(small, tmp_path, monkeypatch):
    monkeypatch.setattr(reading_module, "BLOCK_BYTES", 12_345)
    monkeypatch.setattr(reading_module, "BLOCK_EVENTS", 77)
    monkeypatch.setattr(fold_module, "MERGED_ROWS", 50)
    monkeypatch.setattr(fold_module, "FEWEST_ROWS", 5)
    for file_format in ("json", "parquet"):
        rows = tmp_path / file_format
        fold(small / file_format, rows, workers=1, progressbar=False)
        assert same_files(small / "json-rows", rows)


@pytest.mark.parametrize("messages", [128, 1001])
def test_number_of_messages_is_exact(messages):
    markets = plan(messages, seed=0)
    counts = [sum((e.kind != LEVEL).sum() for e in simulate(market)) for market in markets]
    assert sum(counts) == messages
    assert counts == [market.n_messages for market in markets]


def test_blocks_are_bounded_whatever_the_number_of_messages(tmp_path):
    (market, *_) = plan(600_000, seed=0)
    blocks = list(simulate(market))
    assert max(len(events.kind) for events in blocks) == generate_module.BLOCK
    assert sum((events.kind != LEVEL).sum() for events in blocks) == market.n_messages
    assert all(events.kind[0] == SNAPSHOT for events in blocks if SNAPSHOT in events.kind)
    generate_module._write_parquet(tmp_path / "a.parquet", market.ticker, blocks)
    read = [len(part.events.kind) for part in read_parts(tmp_path / "a.parquet")]
    assert max(read) <= reading_module.BLOCK_EVENTS < sum(read)


def test_features_and_label_drift_in_order_and_not_once_shuffled(large):
    shuffled = np.random.default_rng(0).permutation(large)
    for column in range(4):
        assert anova_f(large[:, column]) > 20
        # F(19, 490,000) exceeds 3.5 with probability 2e-7.
        assert anova_f(shuffled[:, column]) < 3.5


def newton(rows):
    """Fit the logistic regression exactly: coefficients and their standard errors."""
    x, y = np.column_stack([np.ones(len(rows)), rows[:, :3]]), rows[:, 3]
    b = np.zeros(4)
    for _ in range(12):
        p = 1 / (1 + np.exp(-x @ b))
        information = x.T @ (x * (p * (1 - p))[:, None])
        b = b + np.linalg.solve(information, x.T @ (y - p))
    return b, np.sqrt(np.diag(np.linalg.inv(information)))


def test_relation_of_label_and_features_drifts_and_not_once_shuffled(large):
    b, sd = newton(large)
    shuffled = np.random.default_rng(0).permutation(large)
    for tenth in np.array_split(shuffled, 10):
        # Of 40 normal variables one exceeds 5.5 with probability 2e-6.
        assert (np.abs(newton(tenth)[0] - b) < 5.5 * np.sqrt(10) * sd).all()
    tenths = [newton(tenth)[0] for tenth in np.array_split(large, 10)]
    assert all(np.abs((c - b) / sd).max() > 30 for c in tenths)
    assert tenths[0][3] > 0.5
    assert tenths[-1][3] < -0.2


def test_bad_arguments_are_refused(tmp_path, capsys):
    with pytest.raises(ValueError, match="messages must be at least 128, got 127"):
        generate(tmp_path / "out", messages=127, seed=0, progressbar=False)
    with pytest.raises(SystemExit, match="1"):
        run_command(generate, [str(tmp_path), "--messages", "1_000"])
    assert "exists; choose another name" in capsys.readouterr().err
