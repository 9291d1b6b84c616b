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
"""Ordered rows are distinguished from shuffled ones, before and while they are streamed."""

import functools
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pymc.variational._streaming.order.monitor import Monitor
from pymc.variational._streaming.order.report import Stream
from pymc.variational._streaming.order.statistic import Features
from pymc.variational._streaming.sources.arrays import as_source
from pymc.variational.streaming import (
    OrderError,
    StreamError,
    StreamingDataset,
    check_order,
    parquet_source,
    preshuffle,
    shuffle_buffer,
)

N_ROWS = 400_000
WINDOW = 20_000


@functools.cache
def draw(tails: str, n_rows: int = N_ROWS, seed: int = 1) -> np.ndarray:
    """Return three features and a label that depends on them."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n_rows, 3)) if tails == "normal" else rng.standard_t(2, (n_rows, 3))
    rows = np.column_stack([x, label(x @ [0.5, -0.3, 0.2], rng)])
    rows.flags.writeable = False
    return rows


def label(logit: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return (rng.random(len(logit)) < 1 / (1 + np.exp(-logit))).astype(float)


def first(column: np.ndarray, rows: np.ndarray) -> np.ndarray:
    return np.column_stack([column, rows[:, 1:]])


def relate_features(rows: np.ndarray, time: np.ndarray) -> np.ndarray:
    slope = 0.3 * (2 * time - 1)
    second = slope * rows[:, 0] + np.sqrt(1 - slope**2) * rows[:, 1]
    return np.column_stack([rows[:, 0], second, rows[:, 2:]])


def amounts(time: np.ndarray) -> np.ndarray:
    """Return zeros and, one in fifty, amounts that grow tenfold; as often at all times."""
    rng = np.random.default_rng(4)
    return rng.gamma(2.0, 10.0 * 10**time) * (rng.random(len(time)) < 0.02)


ORDERS = {
    "by time": lambda rows, t: np.column_stack([rows[:, :2], t, rows[:, 3]]),
    "by label": lambda rows, t: rows[np.argsort(rows[:, 3], kind="stable")],
    "mean drifts by 0.2 sd": lambda rows, t: first(rows[:, 0] + 0.2 * t, rows),
    "variance drifts by 30 %": lambda rows, t: first(rows[:, 0] * np.sqrt(1 + 0.3 * t), rows),
    "amounts that are mostly zero": lambda rows, t: first(amounts(t), rows),
    "jump in the last tenth": lambda rows, t: first(rows[:, 0] + 0.3 * (t > 0.9), rows),
    "relation of features": relate_features,
}
HEAVY_TAILED = "variance drifts by 30 %", "relation of features"
KINDS = [("normal", name) for name in ORDERS] + [("Student-t(2)", name) for name in HEAVY_TAILED]


def ordered(tails: str, name: str) -> np.ndarray:
    """Return rows in, or drifting with, an order of this kind."""
    return ORDERS[name](draw(tails), np.linspace(0, 1, N_ROWS))


def in_sequence(rows: np.ndarray):
    """Return a source without random access, so that only the check of the stream is left."""
    return lambda: iter(np.array_split(rows, 17))


def marginals(rng: np.random.Generator, n: int) -> dict[str, np.ndarray]:
    """Return shuffled columns of the kinds that mislead tests of normal means."""
    return {
        "normal": rng.normal(size=n),
        "Cauchy": rng.standard_cauchy(n),
        "log-normal": rng.lognormal(0, 3, n),
        "rare binary": (rng.random(n) < 1e-4).astype(float),
        "single event": (np.arange(n) == n // 3).astype(float),
        "fair binary": (rng.random(n) < 0.5).astype(float),
        "constant": np.full(n, 0.1),
        "mostly zero": rng.lognormal(0, 2, n) * (rng.random(n) < 0.01),
        "counts": rng.poisson(0.05, n).astype(float),
        "seconds since 1970": 1.7e9 + rng.permutation(n),
    }


MARGINALS = marginals(np.random.default_rng(3), N_ROWS)


class Chunked(np.ndarray):
    """An array whose rows can only be read three at a time, as those of zarr and h5py are."""

    chunks = 3, 4


class TestDetection:
    @pytest.mark.parametrize("kind", KINDS, ids="-".join)
    def test_a_sample_and_the_stream_show_order(self, kind):
        rows = ordered(*kind)
        for source, margin in ((rows, 1e-5), (in_sequence(rows), 1e-2)):
            report = check_order(source, buffer_size=WINDOW)
            assert report.ordered
            assert report.p_value < margin * report.threshold

    def test_the_design_effect_and_the_drift_are_right_for_known_shifts(self):
        """ρ = between / (between + 1); 1 % tolerance for the sampling of 20 windows' means."""
        rng = np.random.default_rng(4)
        shift = np.repeat(rng.permutation(np.linspace(-0.4, 0.4, 20)), WINDOW)
        rows = (rng.normal(size=N_ROWS) + shift)[:, None]
        between = np.var(np.linspace(-0.4, 0.4, 20), ddof=1)
        correlation = between / (between + 1)
        report = check_order(rows, buffer_size=WINDOW)
        assert report.feature == "column 0"
        assert report.design_effect == pytest.approx(WINDOW * correlation, rel=0.05)
        assert report.drift == pytest.approx(np.sqrt(N_ROWS * correlation), rel=0.05)

    def test_a_drift_that_single_batches_hide_shows_in_groups_of_them(self):
        rows = ordered("normal", "mean drifts by 0.2 sd")
        report = check_order(in_sequence(rows), buffer_size=500)
        assert report.ordered
        assert re.search(r"between \d+ groups of [\d,]+ adjacent rows", str(report))

    def test_rows_that_only_come_in_sequence_are_all_compared(self):
        """A quarter of the rows does not show this drift, which is 22 posterior sd."""
        rows = np.random.default_rng(3).normal(np.linspace(0, 0.1, 200_000)[:, None], 1)
        for source in (rows, in_sequence(rows)):
            assert check_order(source, buffer_size=5_000).ordered
        steady = in_sequence(np.random.default_rng(3).normal(size=(200_000, 1)))
        assert not check_order(steady, buffer_size=5_000).ordered

    def test_what_changes_from_window_to_window_is_not_averaged_out(self):
        """As day and night do, in a buffer of half a day; also if it begins late."""
        window = np.arange(N_ROWS) // 1_000
        changes = 0.2 * (-1.0) ** window * (window > 250)
        rows = np.random.default_rng(4).normal(changes)[:, None]
        for source in (rows, in_sequence(rows)):
            assert check_order(source, buffer_size=1_000).ordered
        ds = StreamingDataset(
            shuffle_buffer(in_sequence(rows), buffer_size=1_000, seed=0),
            batch_size=500,
            total_size=N_ROWS,
            order_check="raise",
        )
        with ds, pytest.raises(OrderError, match="windows of 1,000 rows"):
            advance_through(ds)

    def test_two_windows_are_compared_though_one_is_short(self):
        rows = np.sort(draw("normal", 48_000), axis=0)
        for source in (rows, in_sequence(rows)):
            assert check_order(source, buffer_size=40_000).ordered

    @pytest.mark.parametrize("n_rows, window, length", [(40_000, 2_000, 7), (4_000, 3_000, 1)])
    def test_blocks_of_few_rows_show_order(self, n_rows, window, length):
        """Blocks have too few rows to fit the features on, or the table has, and are overwritten."""
        rows = np.random.default_rng(5).normal(size=(n_rows, 2))
        rows[:, 0] = np.linspace(0, 1, n_rows) + 0.1 * rows[:, 0]
        block = np.empty((length, 2))

        def blocks():
            for first in range(0, len(rows), length):
                part = block[: len(rows[first : first + length])]
                part[:] = rows[first : first + length]
                yield part

        report = check_order(blocks, buffer_size=window)
        expected = check_order(lambda: iter([rows]), buffer_size=window)
        assert report.ordered
        assert report.feature.startswith("column 0")
        assert f"{-(-n_rows // window)} windows of {window:,} rows" in str(report)
        assert report.rows_read == expected.rows_read

    def test_many_columns_and_other_shapes(self):
        rng = np.random.default_rng(5)
        images = rng.normal(size=(50_000, 4, 5))
        assert not check_order(images, buffer_size=5_000).ordered
        images[:, 1, 2] += np.linspace(0, 1, 50_000)
        for source in (images, in_sequence(images)):
            assert check_order(source, buffer_size=5_000).feature.startswith("column 7")

    @pytest.mark.parametrize("where", [slice(-4_000, None), slice(N_ROWS // 3, N_ROWS // 3 + 60)])
    def test_a_rare_value_that_stands_in_one_place_shows_order(self, where):
        """The sample sees it where it hits enough of the rows, and the stream uses all of them."""
        rows = np.column_stack([draw("normal")[:, 0], np.zeros(N_ROWS)])
        rows[where, 1] = 1
        assert check_order(rows, buffer_size=WINDOW).ordered or where.stop
        assert check_order(in_sequence(rows), buffer_size=WINDOW).ordered


class TestSilence:
    def test_shuffled_rows_of_any_marginals_raise_no_alarm(self):
        rows = np.random.default_rng(6).permutation(np.column_stack(list(MARGINALS.values())))
        for source in (rows, in_sequence(rows)):
            for window in (500, WINDOW):
                assert not check_order(source, buffer_size=window).ordered

    @pytest.mark.parametrize("period", [37, WINDOW])
    def test_patterns_that_a_window_averages_out_raise_no_alarm(self, period):
        pattern = np.arange(N_ROWS) % period / period
        rows = np.column_stack([draw("normal")[:, 0] + 3 * pattern, pattern > 0.5])
        for source in (rows, in_sequence(rows)):
            assert not check_order(source, buffer_size=WINDOW).ordered

    def test_a_buffer_that_holds_the_table_leaves_nothing_to_compare(self):
        rows = np.arange(float(WINDOW))[:, None]
        for source in (rows, in_sequence(rows), rows[: WINDOW // 2]):
            report = check_order(source, buffer_size=WINDOW)
            assert not report.ordered
            assert str(report).startswith("Nothing to compare: one window")

    def test_a_difference_that_no_posterior_notices_raises_no_alarm(self):
        """Window means of a design effect of 4.7: chi-square is 90 on 19 degrees of freedom.

        The mean square within windows, of blocks of 62 rows, has an sd of 0.057.
        """
        noise = np.random.default_rng(7).normal(size=(20, 2_000))
        noise -= noise.mean(axis=1, keepdims=True)
        shift = np.linspace(-1, 1, 20)[:, None]
        rows = noise + shift * np.sqrt(90 / 2_000 / (shift**2).sum())
        report = check_order(rows.reshape(-1, 1), buffer_size=2_000)
        assert report.p_value < report.threshold
        assert not report.ordered
        assert report.design_effect == pytest.approx(90 / 19, abs=4 * 0.057 + 0.3)
        assert str(report).startswith("No order that a posterior would notice: 'column 0' differs")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_a_stream_refuses_are_refused(value):
    rows = np.random.default_rng(0).normal(size=(20_000, 2))
    rows[:, 0] += np.linspace(0, 5, 20_000)
    rows[5_000:, 1] = value
    for source in (rows, in_sequence(rows)):
        with pytest.raises(StreamError, match=rf"row 5000 of the stream holds {value} in col"):
            check_order(source, buffer_size=1_000)


def advance_through(ds: StreamingDataset) -> None:
    """Read the rest of the epoch."""
    while ds.epoch == 0:
        ds.advance()


class TestUnits:
    def test_units_do_not_matter(self):
        rows = draw("normal", 4_000).copy()
        rows[:, 0] += np.linspace(0, 0.5, 4_000)
        other = np.column_stack([-1e6 * (rows[:, :3] + 3), rows[:, 3]])
        for source in (lambda x: x, in_sequence):
            expected, found = (check_order(source(x), buffer_size=200) for x in (rows, other))
            assert found.feature == expected.feature
            np.testing.assert_allclose(found.p_value, expected.p_value, rtol=1e-6)

    @pytest.mark.parametrize("dtype", ["float16", ">f8", "int64", "bool"])
    def test_rows_of_any_type_are_compared(self, dtype):
        rows = np.linspace(0, 1.9, 20_000).reshape(-1, 1).astype(dtype)
        rows[:10_000] = 0
        for source in (lambda x: x, in_sequence):
            assert check_order(source(rows), buffer_size=1_000).ordered

    def test_memory_does_not_grow_with_the_number_of_windows(self):
        """Of 40,000 windows, at most 40 groups are kept, which hold every row once."""
        matplotlib = pytest.importorskip("matplotlib")
        matplotlib.use("Agg")
        ax = check_order(in_sequence(MARGINALS["normal"][:, None]), buffer_size=10).plot()
        positions = ax.get_lines()[0].get_xdata()
        assert 20 <= len(positions) <= 40
        assert positions[0] == pytest.approx(0.5 * np.diff(positions)[0])
        matplotlib.pyplot.close(ax.figure)


def test_few_rows_are_compared_though_a_column_is_constant_at_first():
    """All rows that differ from that constant would count as rare ones, each of which is compared."""
    rows = draw("normal").copy()
    rows[:5_000, 0] = 0
    stream = Stream(as_source(rows), WINDOW, N_ROWS)
    monitor = Monitor(stream, lambda pilot: Features(pilot, None))
    for first in range(0, N_ROWS, WINDOW):
        monitor.add(first, rows[first : first + WINDOW])
    assert monitor.compare(last=True).rows_read < 0.5 * N_ROWS


def write(folder, rows: np.ndarray, row_group_size: int) -> str:
    table = pa.table({name: rows[:, j] for j, name in enumerate("abcy"[: rows.shape[1]])})
    pq.write_table(table, folder / "rows.parquet", row_group_size=row_group_size)
    return str(folder / "rows.parquet")


class TestParquet:
    @pytest.mark.parametrize("row_group_size", [1_000, 65_537])
    def test_the_sample_is_of_the_rows_it_claims(self, tmp_path, row_group_size):
        """Files and arrays give the same report, whatever the row groups."""
        rows = ordered("normal", "jump in the last tenth")
        source = parquet_source(write(tmp_path, rows, row_group_size))
        report, expected = (check_order(x, buffer_size=WINDOW) for x in (source, rows))
        assert report.ordered
        assert report.rows_read == expected.rows_read
        assert report.p_value == pytest.approx(expected.p_value, rel=1e-6)

    def test_row_groups_that_cost_too_much_are_left_to_the_stream(self, tmp_path, monkeypatch):
        monkeypatch.setattr("pymc.variational._streaming.order.preflight._BUDGET", 1 << 20)
        source = parquet_source(write(tmp_path, ordered("normal", "mean drifts by 0.2 sd"), N_ROWS))
        assert check_order(source, buffer_size=WINDOW).ordered
        buffer = shuffle_buffer(source, buffer_size=WINDOW, batch_size=500, seed=0)
        with StreamingDataset(buffer, batch_size=500, order_check="raise") as ds:
            assert ds.advance()
            with pytest.raises(OrderError):
                advance_through(ds)

    def test_row_groups_in_random_order_are_judged_in_that_order(self, tmp_path):
        path = write(tmp_path, ordered("normal", "by time")[::4], 1_000)
        source = parquet_source(path, shuffle_row_groups=True, seed=0)
        assert check_order(source, buffer_size=4_000).ordered
        assert not check_order(source, buffer_size=N_ROWS // 4).ordered


@pytest.fixture(scope="module")
def alarm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("order")
    rows = ordered("normal", "mean drifts by 0.2 sd")
    return check_order(parquet_source(write(folder, rows, 10_000)), buffer_size=WINDOW)


class TestReport:
    def test_the_alarm_gives_the_finding_one_repair_and_the_numbers(self, alarm):
        assert str(alarm).split(". ") == [
            "The rows are in an order that the stream does not mix: 'a' differs between 20 windows "
            "of 20,000 rows",
            f"Shuffle the table once: {alarm.repair}",
            f"The posterior mean would follow them by about {alarm.drift:,.0f} posterior standard "
            f"deviations (p = {alarm.p_value:.1g}, alarm below {alarm.threshold:.1g}), the design "
            f"effect is {alarm.design_effect:,.0f} (means vary that many times as much as those of "
            "random rows), and one window covers 5 % of the 400,000 rows",
        ]

    def test_silence_says_what_it_could_not_have_seen(self):
        report = check_order(draw("normal"), buffer_size=WINDOW)
        assert str(report).startswith(
            "No order found: 20 windows of 20,000 rows differ no more than random ones would"
        )
        assert f"less than {report.visible:,.0f} posterior standard deviations" in str(report)

    @pytest.mark.parametrize(
        "path, shuffled",
        [
            ("table/rows.parquet", "table/rows-shuffled"),
            ("table/", "table-shuffled"),
            ("table/**/*.parquet", "table-shuffled"),
            ("**/*.parquet", "../shuffled"),
            (".", "../shuffled"),
            (["table/*"], "shuffled"),
        ],
        ids=["file", "folder", "glob", "glob of all", "working directory", "globs"],
    )
    def test_the_repair_of_parquet_files_shuffles_them(self, tmp_path, monkeypatch, path, shuffled):
        (tmp_path / "here" / "table").mkdir(parents=True)
        monkeypatch.chdir(tmp_path / "here")
        write(tmp_path / "here" / "table", np.linspace(0, 1, 20_000)[:, None], 20_000)
        report = check_order(parquet_source(path), buffer_size=1_000)
        assert report.ordered
        exec(report.repair, {"preshuffle": functools.partial(preshuffle, progressbar=False)})
        assert not check_order(parquet_source(shuffled), buffer_size=1_000).ordered

    def test_the_repair_of_rows_that_are_in_no_parquet_files_writes_them_to_files(self):
        expected = 'write the rows to Parquet, and preshuffle("rows.parquet", "shuffled", seed=0)'
        for source in (np.ones((9, 4)).view(Chunked), iter([np.ones(9)])):
            assert check_order(source).repair == expected

    def test_the_repair_of_an_array_shuffles_it(self):
        rows = np.linspace(0, 1, 20_000)[:, None]
        repair = check_order(rows, buffer_size=1_000).repair
        assert not check_order(eval(repair, {"rows": rows, "np": np}), buffer_size=1_000).ordered

    def test_the_figure_shows_means_and_band(self, alarm):
        matplotlib = pytest.importorskip("matplotlib")
        matplotlib.use("Agg")
        ax = alarm.plot()
        worst, *others, _ = ax.get_lines()
        assert worst.get_label() == alarm.feature == "a"
        np.testing.assert_allclose(worst.get_xdata(), (np.arange(20) + 0.5) / 20)
        assert np.ptp(worst.get_ydata()) == pytest.approx(0.19, abs=0.05)
        assert len(others) == 2
        assert len(ax.collections) == 3
        matplotlib.pyplot.close(ax.figure)
