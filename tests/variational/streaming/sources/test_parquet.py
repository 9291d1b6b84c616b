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
"""What Parquet files a source accepts, and how it names the place of what it refuses."""

import base64
import gc
import json
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pymc.variational.streaming import (
    StreamError,
    StreamingDataset,
    arrow_source,
    parquet_source,
    preshuffle,
    shuffle_buffer,
)
from tests.variational.streaming.held import open_files
from tests.variational.streaming.strategies import numbered, rows_of, table, write_layout

INVALID = {
    "null": (pa.array([0.5, None, 1.0]), "is null"),
    "null integer": (pa.array([0, None, 1]), "is null"),
    "null boolean": (pa.array([True, None, False]), "is null"),
    "null in a dictionary": (pa.array([0, None, 1]).dictionary_encode(), "is null"),
    "null decimal": (pa.array([0, None, 1]).cast(pa.decimal128(20, 0)), "is null"),
    "NaN": (pa.array([0.5, np.nan, 1.0]), "is nan"),
    "infinity": (pa.array([0.5, -np.inf, 1.0]), "is -inf"),
    "lossy integer": (
        pa.array([0, 2**53 + 1, 2**53]),
        "is 9007199254740993, which float64 cannot hold exactly",
    ),
    "lossy negative integer": (pa.array([0, -(2**63), 1]), "is -9223372036854775808, which"),
    "lossy unsigned integer": (pa.array([0, 2**64 - 1, 1], pa.uint64()), "is 1844674407370955"),
}


@pytest.mark.parametrize("values, problem", INVALID.values(), ids=INVALID)
class TestInvalidValues:
    def write(self, folder, values):
        """Put the invalid value in the second row group of the second file."""
        rows = pa.table({"x": [0.25, 0.5, 0.75], "odd": values})
        good = rows.slice(0, 1)
        pq.write_table(good, folder / "a.parquet")
        with pq.ParquetWriter(folder / "b.parquet", rows.schema) as writer:
            writer.write_table(good)
            writer.write_table(rows)

    def test_they_are_refused_with_their_place(self, tmp_path, values, problem):
        self.write(tmp_path, values)
        with pytest.raises(
            StreamError,
            match=f"b.parquet: column 'odd' {problem}.* in row 1 of row group 1; .*drop",
        ):
            rows_of(parquet_source(tmp_path))

    def test_their_rows_are_dropped_on_demand(self, tmp_path, values, problem):
        self.write(tmp_path, values)
        source = parquet_source(tmp_path, invalid="drop")
        assert (source.n_rows, source.n_dropped) == (4, 1)
        assert rows_of(source)[:, 0].tolist() == [0.25, 0.25, 0.25, 0.75]
        ds = StreamingDataset(source, batch_size=3)
        with ds:
            assert [ds.advance() for _ in range(9)] == [True] * 9
        assert ds.total_size == 4

    def test_a_dropped_row_does_not_shift_a_resumed_stream(self, tmp_path, values, problem):
        self.write(tmp_path, values)
        source = parquet_source(tmp_path, invalid="drop")
        for start in range(5):
            rest = np.concatenate([np.empty((0, 2)), *source.blocks(0, start)])
            np.testing.assert_array_equal(rest, rows_of(source)[start:])


@pytest.mark.parametrize("value", [None, np.nan])
@pytest.mark.parametrize("row", [5_000, 262_145])
def test_an_invalid_value_is_named_in_a_table_that_is_read_in_pieces(tmp_path, value, row):
    values = np.arange(263_000, dtype="float64").astype(object)
    values[row] = value
    column = pa.table({"x": pa.array(values, "float64")})
    pq.write_table(column, tmp_path / "x.parquet", row_group_size=200_000)
    group, place = divmod(row, 200_000)
    name = "null" if value is None else value
    with pytest.raises(
        StreamError, match=f"column 'x' is {name} in row {place} of row group {group};"
    ):
        rows_of(parquet_source(tmp_path))


def test_rows_that_a_reader_leaves_out_are_missed(tmp_path, monkeypatch):
    """A damaged page header can end a column early, for all columns alike."""
    write_layout(tmp_path, [[5, 5]])
    source, read = parquet_source(tmp_path), pq.ParquetFile.iter_batches
    monkeypatch.setattr(
        pq.ParquetFile,
        "iter_batches",
        lambda *args, **kwargs: (b[:7] for b in read(*args, **kwargs)),
    )
    with pytest.raises(StreamError, match="2 row groups gave 7 rows, its footer promises 10"):
        rows_of(source)


class TestLargeValues:
    """A sum shows whether any value is infinite, unless it overflows itself."""

    def test_they_are_read_although_their_sum_overflows(self, tmp_path):
        for dtype in ("float32", "float64"):
            rows = np.full((100, 1), np.finfo(dtype).max, dtype)
            pq.write_table(pa.table({"x": rows[:, 0]}), tmp_path / f"{dtype}.parquet")
            np.testing.assert_array_equal(
                rows_of(parquet_source(tmp_path / f"{dtype}.parquet")), rows
            )

    def test_infinities_that_cancel_are_refused(self, tmp_path):
        pq.write_table(pa.table({"x": [1.0, np.inf, -np.inf]}), tmp_path / "a.parquet")
        with pytest.raises(StreamError, match="column 'x' is inf in row 1 of row group 0"):
            rows_of(parquet_source(tmp_path / "a.parquet"))


class TestFilesThatChange:
    @pytest.fixture
    def source(self, tmp_path):
        write_layout(tmp_path, [[5, 5], [5, 5]])
        return parquet_source(tmp_path)

    @pytest.mark.parametrize(
        "change, message",
        [
            (lambda path: pq.write_table(table(10), path), "changed since the source"),
            (lambda path: path.unlink(), "not a readable Parquet file"),
            (lambda path: os.truncate(path, 100), "not a readable Parquet file"),
            (lambda path: path.write_bytes(b""), "not a readable .*truncated, or another format"),
        ],
        ids=["rewritten", "removed", "truncated", "emptied"],
    )
    def test_they_are_named(self, source, tmp_path, change, message):
        change(tmp_path / "001.parquet")
        with pytest.raises(StreamError, match=f"001.parquet: {message}"):
            rows_of(source)

    def test_a_change_between_epochs_stops_the_stream(self, source, tmp_path):
        ds = StreamingDataset(source, batch_size=5)
        with ds, pytest.raises(StreamError, match=r"001\.parquet: changed"):
            ds.advance()
            pq.write_table(table(10), tmp_path / "new")
            os.replace(tmp_path / "new", tmp_path / "001.parquet")
            for _ in range(20):
                ds.advance()

    @pytest.mark.parametrize("size", [0, 40], ids=["emptied", "truncated"])
    def test_a_change_in_the_midst_of_a_file_is_named_as_such(self, tmp_path, size):
        # Far more rows than a read buffer holds, so that the rest is read from the changed file.
        path = tmp_path / "long.parquet"
        pq.write_table(table(1 << 17), path, row_group_size=1 << 15)
        blocks = parquet_source(path).blocks(block_rows=1 << 10)
        next(blocks)
        os.truncate(path, size)
        with pytest.raises(StreamError, match=r"long\.parquet: changed while it was read"):
            list(blocks)

    def test_another_time_alone_is_no_change(self, source, tmp_path):
        expected = rows_of(source)
        os.utime(tmp_path / "000.parquet")
        blocks = source.blocks()
        found = [next(blocks).copy()]
        os.utime(tmp_path / "000.parquet", ns=(1, 1))
        os.utime(tmp_path / "001.parquet", ns=(1, 1))
        found += [block.copy() for block in blocks]
        np.testing.assert_array_equal(np.concatenate(found), expected)

    def test_empty_and_other_files_are_named(self, tmp_path):
        (tmp_path / "a.parquet").write_bytes(b"")
        with pytest.raises(StreamError, match=r"a.parquet: not a readable Parquet file"):
            parquet_source(tmp_path)
        (tmp_path / "a.parquet").write_text("mid,spread\n0.5,0.01\n" * 9)
        with pytest.raises(StreamError, match=r"a.parquet: .* does not end like a Parquet file"):
            parquet_source(tmp_path)

    @pytest.mark.parametrize("plaintext_footer", [False, True])
    def test_encrypted_files_are_named_and_read_as_the_message_says(
        self, tmp_path, plaintext_footer
    ):
        """Where only columns are encrypted, Arrow ends the process when it looks at one."""
        encryption = pytest.importorskip("pyarrow.parquet.encryption")

        class Client(encryption.KmsClient):
            def __init__(self, config):
                super().__init__()

            def wrap_key(self, key, name):
                return base64.b64encode(key)

            def unwrap_key(self, wrapped, name):
                return base64.b64decode(wrapped)

        factory, config = encryption.CryptoFactory(Client), encryption.KmsConnectionConfig()
        keys = encryption.EncryptionConfiguration(
            "footer", column_keys={"one": ["x"]}, plaintext_footer=plaintext_footer
        )
        path, expected = tmp_path / "a.parquet", pa.table({"x": [1.0, 2.0], "y": [3.0, 4.0]})
        properties = factory.file_encryption_properties(config, keys)
        with pq.ParquetWriter(path, expected.schema, encryption_properties=properties) as writer:
            writer.write_table(expected)
        for read in (parquet_source, lambda path: preshuffle(path, tmp_path / "out", seed=0)):
            with pytest.raises(StreamError, match=r"a.parquet: .*is encrypted; pass arrow_source"):
                read(path)
        decryption = factory.file_decryption_properties(config)
        source = arrow_source(
            lambda: pq.ParquetFile(path, decryption_properties=decryption).iter_batches()
        )
        assert rows_of(source).tolist() == [[1, 3], [2, 4]]

    def test_a_table_without_rows_is_refused(self, tmp_path):
        write_layout(tmp_path, [[0], []])
        with pytest.raises(ValueError, match=r"000.parquet: no rows to stream in 2 file"):
            parquet_source(tmp_path)

    def test_a_table_of_invalid_rows_alone_is_refused(self, tmp_path):
        pq.write_table(pa.table({"x": [1.0, 2.0], "empty": pa.nulls(2)}), tmp_path / "a.parquet")
        with pytest.raises(ValueError, match=r"a.parquet: all 2 rows hold a value that is invalid"):
            parquet_source(tmp_path, invalid="drop")
        assert parquet_source(tmp_path, columns=["x"], invalid="drop").n_dropped == 0

    def test_corrupt_pages_are_noticed_where_pages_have_checksums(self, tmp_path):
        path = tmp_path / "a.parquet"
        values = pa.table({"x": np.random.default_rng(0).normal(size=1000)})
        pq.write_table(values, path, write_page_checksum=True, compression="none")
        content = bytearray(path.read_bytes())
        content[2000] ^= 1
        path.write_bytes(content)
        with pytest.raises(StreamError, match=r"a.parquet: reading failed .*[Cc][Rr][Cc]"):
            rows_of(parquet_source(path))


class TestReading:
    @pytest.mark.parametrize(
        "group_rows, expected",
        [
            (100_000, [200_000, 150_000]),
            (300_000, [150_000, 150_000, 50_000]),
            (1 << 15, [1 << 18, 9]),
        ],
    )
    def test_reads_end_where_row_groups_do(self, tmp_path, group_rows, expected):
        """A read of more would copy what it has; at most 2**18 rows are read at a time."""
        rows = pa.table({"x": np.zeros(sum(expected), "int8")})
        pq.write_table(rows, tmp_path / "x.parquet", row_group_size=group_rows)
        assert [len(block) for block in parquet_source(tmp_path)] == expected

    def test_a_source_reads_each_footer_once_when_it_is_made(self, tmp_path, monkeypatch):
        memory = pytest.importorskip("fsspec").filesystem("memory")
        reads = []
        read = type(memory).cat_file
        monkeypatch.setattr(
            type(memory), "cat_file", lambda *a, **k: reads.append(a[1]) or read(*a, **k)
        )
        write_layout(tmp_path, [[5, 5]] * 3)
        for path in sorted(tmp_path.iterdir()):
            memory.pipe(f"/once/{path.name}", path.read_bytes())
        parquet_source("/once", filesystem=memory)
        assert [os.path.basename(path) for path in reads] == [f"00{i}.parquet" for i in range(3)]

    @pytest.mark.parametrize("prefetch", [True, False])
    def test_an_abandoned_dataset_leaves_no_open_file(self, tmp_path, prefetch):
        write_layout(tmp_path, [[400] * 50, [5]])
        buffer = shuffle_buffer(parquet_source(tmp_path), buffer_size=100, batch_size=10, seed=0)
        ds = StreamingDataset(buffer, batch_size=10, prefetch=prefetch, order_check="off")
        ds.advance()
        assert any(str(tmp_path) in file for file in open_files())
        del ds
        gc.collect()
        assert not any(str(tmp_path) in file for file in open_files())

    def test_two_iterations_do_not_disturb_each_other(self, tmp_path):
        write_layout(tmp_path, [[5, 5], [5]])
        source = parquet_source(tmp_path)
        pairs = list(zip(source, source))
        for stream in zip(*pairs):
            np.testing.assert_array_equal(np.concatenate(stream), numbered(15))

    def test_reading_starts_at_any_row(self, tmp_path):
        n_rows = write_layout(tmp_path, [[3, 0, 4], [], [1, 5]])
        source = parquet_source(tmp_path)
        for start in range(n_rows + 1):
            rest = np.concatenate([np.empty((0, 2)), *source.blocks(0, start)])
            np.testing.assert_array_equal(rest, numbered(n_rows)[start:])

    def test_row_groups_come_in_another_order_each_epoch(self, tmp_path):
        write_layout(tmp_path, [[2] * 20, [2] * 20])
        source = parquet_source(tmp_path, shuffle_row_groups=True, seed=0)
        epochs = [np.concatenate(list(source.blocks(epoch)))[:, 0] for epoch in (0, 1)]
        assert not np.array_equal(*epochs)
        pairs = epochs[0].reshape(-1, 2)
        np.testing.assert_array_equal(pairs[:, 0] + 1, pairs[:, 1])

    def test_unknown_choices_are_refused(self, tmp_path):
        write_layout(tmp_path, [[2]])
        with pytest.raises(ValueError, match="invalid='skip' is not a choice"):
            parquet_source(tmp_path, invalid="skip")


class TestMarks:
    def write(self, path, index, **values):
        """Write one of two files with a mark, which names the byte where its column ends."""
        rows = pa.table({"x": [1.0, 2.0]})
        pq.write_table(rows, path)
        chunk = pq.read_metadata(path).row_group(0).column(0)
        start = chunk.dictionary_page_offset or chunk.data_page_offset
        mark = {"shuffle": "a1", "seed": 0, "source": "ticks", "fingerprint": "f", "n_rows": 4}
        mark |= {"n_files": 2, "index": index, "data_end": start + chunk.total_compressed_size}
        metadata = {"pymc.preshuffle": json.dumps(mark | {"version": 2} | values)}
        pq.write_table(rows.replace_schema_metadata(metadata), path)

    def test_preshuffled_rows_know_that_they_are(self, tmp_path):
        (tmp_path / "ordered").mkdir()
        write_layout(tmp_path / "ordered", [[50], [50]])
        preshuffle(tmp_path / "ordered", tmp_path / "shuffled", seed=5, progressbar=False)
        source = parquet_source(tmp_path / "shuffled")
        assert source.shuffled and not parquet_source(tmp_path / "ordered").shuffled
        assert (source.mark.seed, source.mark.source) == (5, str(tmp_path / "ordered"))
        assert sorted(rows_of(source)[:, 0]) == list(range(100))

    @pytest.mark.parametrize("seed", [0, 7])
    def test_files_of_two_shuffles_are_refused(self, tmp_path, seed):
        self.write(tmp_path / "0.parquet", 0)
        self.write(tmp_path / "1.parquet", 1, seed=seed, shuffle="b2")
        with pytest.raises(StreamError, match=rf"belong to two shuffles \(seeds {seed} and 0\)"):
            parquet_source(tmp_path)

    @pytest.mark.parametrize("version", [1, 3])
    def test_a_mark_of_another_version_is_refused_by_file(self, tmp_path, version):
        self.write(tmp_path / "0.parquet", 0, version=version, unknown=0)
        with pytest.raises(StreamError, match=rf"0\.parquet: its .*version {version} .*; update"):
            parquet_source(tmp_path)
