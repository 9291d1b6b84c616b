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
"""Random Parquet files, what is in them, and ways to damage them."""

import io

from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

__all__ = ["Case", "damage", "make_case", "regions"]

_INTEGERS = ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"]
_FLOATS = ["halffloat", "float", "double"]
_ODD = [
    pa.string(),
    pa.binary(),
    pa.timestamp("us", "UTC"),
    pa.date32(),
    pa.time64("us"),
    pa.list_(pa.float64()),
    pa.struct([("x", pa.int32())]),
    pa.map_(pa.int32(), pa.float64()),
    pa.dictionary(pa.int32(), pa.string()),
    pa.null(),
]
_NAMES = ["x", "x.y", "mid price", "größe", "", "col\n", "x" * 300, "up", "spread", "y"]
_CODECS = ["none", "snappy", "gzip", "brotli", "zstd", "lz4"]
_DAMAGES = [
    "a bit",
    "some bytes",
    "zeros",
    "garbage",
    "truncated",
    "appended",
    "swapped",
    "footer",
    "footer length",
    "huge count",
]


@dataclass(frozen=True, slots=True)
class Case:
    """A file, how it is asked for, and what must come out."""

    content: bytes
    """Undamaged."""
    columns: list[str] | None
    invalid: str
    rows: list[list[Any]] | None
    """Values by column; None if the file must be refused."""
    checksums: bool
    damage: str | None
    late: bool
    """Whether the file is damaged after the source was made, its time put back."""

    def expects(self, rows: np.ndarray) -> bool:
        if self.rows is None or rows.shape != (len(self.rows[0]), len(self.rows)):
            return False
        return all(_equal(rows[:, j].tolist(), column) for j, column in enumerate(self.rows))


def make_case(number: int) -> Case:
    """Make the file of this number, always the same."""
    rng = np.random.default_rng(np.random.SeedSequence(0, spawn_key=(number,)))
    table = _table(rng)
    checksums = bool(rng.random() < 0.5)
    content = _write(table, rng, checksums)
    columns = None
    if rng.random() < 0.5:
        size = int(rng.integers(1, table.num_columns + 1))
        columns = [table.column_names[j] for j in rng.permutation(table.num_columns)[:size]]
    invalid = str(rng.choice(["raise", "drop"], p=[0.8, 0.2]))
    whole = pq.ParquetFile(io.BytesIO(content)).read()
    rows = _oracle(whole, table.column_names if columns is None else columns, invalid)
    kind = str(rng.choice(_DAMAGES)) if rng.random() < 0.8 else None
    late = kind is not None and bool(rng.random() < 0.2)
    return Case(content, columns, invalid, rows, checksums, kind, late)


def damage(case: Case, number: int) -> bytes:
    """Return the content of the file as it will be read."""
    rng = np.random.default_rng(np.random.SeedSequence(1, spawn_key=(number,)))
    data = np.frombuffer(case.content, "uint8").copy()
    size = len(data)
    footer = _footer_start(case.content)
    place = int(rng.integers(size))
    length = min(int(2 ** rng.uniform(0, 9)), size - place)
    other = int(rng.integers(size - length + 1))
    match case.damage:
        case "a bit":
            data[place] ^= 1 << rng.integers(8)
        case "some bytes":
            data[rng.integers(size, size=rng.integers(1, 9))] = rng.integers(256)
        case "zeros":
            data[place : place + length] = 0
        case "garbage":
            data[place : place + length] = rng.integers(256, size=length)
        case "truncated":
            return case.content[:place]
        case "appended":
            tail = [rng.bytes(length), case.content[-length:], b"PAR1", case.content]
            return case.content + tail[rng.integers(4)]
        case "swapped":
            data[place : place + length] = data[other : other + length].copy()
        case "footer":
            data[rng.integers(footer, size - 8, size=rng.integers(1, 5))] = rng.integers(256)
        case "footer length":
            data[size - 8 : size - 4] = np.frombuffer(rng.bytes(4), "uint8")
        case "huge count":
            return _with_huge_count(case.content, footer, rng)
    return data.tobytes()


def regions(before: bytes, after: bytes) -> str:
    """Name the parts of a file that differ: page data, page headers or the footer."""
    if len(before) != len(after):
        return "footer"
    data, footer = _page_data(before), _footer_start(before)
    parts = set()
    for place in np.flatnonzero(np.frombuffer(before, "uint8") != np.frombuffer(after, "uint8")):
        if place >= footer:
            parts.add("footer")
        else:
            inside = any(start <= place < stop for start, stop in data)
            parts.add("page data" if inside else "page headers")
    return " and ".join(sorted(parts)) or "nothing"


def _table(rng: np.random.Generator) -> pa.Table:
    n_rows = int(rng.choice([0, 1, 2, 7, 50, 200, 1000], p=[0.02, 0.04, 0.04, 0.2, 0.3, 0.3, 0.1]))
    width = int(rng.integers(1, 7))
    odd, nulls, infinite = rng.random(3) < (0.15, 0.15, 0.1)
    names = rng.permutation(_NAMES)[:width].tolist()
    if rng.random() < 0.02:
        names[0] = names[-1]
    arrays = [_numbers(rng, n_rows, infinite) for _ in names]
    if nulls and n_rows:
        j = rng.integers(width)
        mask = pa.array(rng.random(n_rows) < rng.choice([0.02, 0.5, 1.0]))
        arrays[j] = pa.compute.if_else(mask, pa.scalar(None, arrays[j].type), arrays[j])
    if odd:
        kind = _ODD[rng.integers(len(_ODD))]
        arrays[rng.integers(width)] = pa.array([None] * n_rows, kind)
    return pa.table(arrays, names=names)


def _numbers(rng: np.random.Generator, n_rows: int, infinite: bool) -> pa.Array:
    kind = rng.choice(["integer", "float", "bool", "decimal", "dictionary"])
    if kind == "bool":
        return pa.array(rng.random(n_rows) < 0.5)
    if kind == "dictionary":
        name = str(rng.choice(["int16", "int64", "uint32", "double", "float"]))
        values = rng.integers(0, 20, n_rows).astype(pa.type_for_alias(name).to_pandas_dtype())
        return pa.array(values).dictionary_encode()
    if kind == "decimal":
        return _decimals(rng, n_rows)
    if kind == "integer":
        dtype = pa.type_for_alias(str(rng.choice(_INTEGERS))).to_pandas_dtype()
        span = np.iinfo(dtype)
        low, high = (span.min, span.max) if rng.random() < 0.3 else (0, 100)
        return pa.array(rng.integers(low, high, n_rows, dtype=dtype, endpoint=True))
    values = rng.standard_normal(n_rows)
    if rng.random() < 0.3:
        values = values.round(1)
    if infinite:
        values[rng.random(n_rows) < 0.05] = rng.choice([np.nan, np.inf, -np.inf])
    dtype = pa.type_for_alias(str(rng.choice(_FLOATS))).to_pandas_dtype()
    return pa.array(values.astype(dtype))


def _decimals(rng: np.random.Generator, n_rows: int) -> pa.Array:
    precision = int(rng.choice([4, 9, 18, 30, 50]))
    scale = int(rng.integers(0, min(precision, 6)))
    make = pa.decimal256 if precision > 38 else pa.decimal128
    digits = int(rng.integers(1, precision + 1))
    drawn = rng.integers(0, 10, (n_rows, digits))
    values = [Decimal("".join(map(str, row))).scaleb(-scale) for row in drawn.tolist()]
    return pa.array([-v if k % 3 else v for k, v in enumerate(values)], make(precision, scale))


def _write(table: pa.Table, rng: np.random.Generator, checksums: bool) -> bytes:
    options: dict[str, Any] = {
        "version": str(rng.choice(["1.0", "2.4", "2.6"])),
        "data_page_version": str(rng.choice(["1.0", "2.0"])),
        "compression": str(rng.choice(_CODECS)),
        "data_page_size": int(rng.choice([16, 300, 1 << 20])),
        "write_batch_size": int(rng.choice([1, 10, 1024])),
        "write_statistics": bool(rng.random() < 0.7),
        "write_page_index": bool(rng.random() < 0.3),
        "store_schema": bool(rng.random() < 0.8),
        "store_decimal_as_integer": bool(rng.random() < 0.5),
        "write_page_checksum": checksums,
        "use_dictionary": bool(rng.random() < 0.5),
    }
    names = table.column_names
    if not options["use_dictionary"] and len(set(names)) == len(names):
        options["column_encoding"] = _encodings(table, rng)
    if rng.random() < 0.2:
        options["dictionary_pagesize_limit"] = 64
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, table.schema, **options) as writer:
        start = 0
        while start < len(table) or rng.random() < 0.1:
            size = int(rng.choice([0, 1, 5, 40, 1000]))
            writer.write_table(table.slice(start, size), row_group_size=max(size, 1))
            start += size
    return sink.getvalue()


def _encodings(table: pa.Table, rng: np.random.Generator) -> dict[str, str]:
    """Choose an encoding for each column that has a choice."""
    chosen = {}
    for field in table.schema:
        choices = ["PLAIN"]
        if pa.types.is_boolean(field.type):
            choices.append("RLE")
        elif pa.types.is_integer(field.type):
            choices += ["DELTA_BINARY_PACKED", "BYTE_STREAM_SPLIT"]
        elif pa.types.is_floating(field.type):
            choices.append("BYTE_STREAM_SPLIT")
        else:
            continue
        chosen[field.name] = str(rng.choice(choices))
    return chosen


def _oracle(table: pa.Table, names: list[str], invalid: str) -> list[list[Any]] | None:
    """Return the rows that a source must give, from Python's numbers; None for none."""
    if not len(table) or any(table.column_names.count(name) > 1 for name in names):
        return None
    fields = [table.schema.field(name).type for name in names]
    kinds = [t.value_type if pa.types.is_dictionary(t) else t for t in fields]
    tests = pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean, pa.types.is_decimal
    if not all(any(test(kind) for test in tests) for kind in kinds):
        return None
    columns = [table[name].to_pylist() for name in names]
    rows = list(zip(*columns))
    good = [row for row in rows if _is_valid(row, _limit(kinds))]
    if not good or (invalid == "raise" and len(good) < len(rows)):
        return None
    return [list(column) for column in zip(*good)]


def _limit(kinds: list[pa.DataType]) -> float:
    """Return the integer from which on the rows' type has gaps."""
    dtypes = [float if pa.types.is_decimal(k) else k.to_pandas_dtype() for k in kinds]
    dtype = np.result_type(*dtypes)
    return {"float64": 2.0**53, "float32": 2.0**24}.get(dtype.name, np.inf)


def _is_valid(row: tuple, limit: float) -> bool:
    for value in row:
        if value is None or not np.isfinite(float(value)):
            return False
        whole = isinstance(value, int) or (isinstance(value, Decimal) and not value.as_tuple()[2])
        if whole and (abs(value) > limit or (abs(value) == limit and isinstance(value, Decimal))):
            return False
    return True


def _equal(found: list, expected: list) -> bool:
    """Compare exactly, but for decimals, whose fractions are rounded."""
    if isinstance(expected[0], Decimal):
        return bool(np.allclose(found, [float(v) for v in expected], rtol=4e-16, atol=0))
    return found == expected


def _footer_start(content: bytes) -> int:
    return len(content) - 8 - int.from_bytes(content[-8:-4], "little")


def _with_huge_count(content: bytes, footer: int, rng: np.random.Generator) -> bytes:
    """Replace one of the footer's numbers by a huge or a negative one."""
    body = content[footer:-8]
    values = {pq.read_metadata(io.BytesIO(content)).num_rows, int(rng.integers(1, 64))}
    numbers = [_varint(2 * value) for value in values]
    places = [(k, n) for n in numbers for k in range(4, len(body)) if body.startswith(n, k)]
    if not places:
        return content[:footer] + _varint(1 << 61) + content[footer + 1 :]
    place, number = places[rng.integers(len(places))]
    huge = _varint([1 << 61, 1 << 41, (1 << 32) - 2, 2**64 - 1, 3][rng.integers(5)])
    body = body[:place] + huge + body[place + len(number) :]
    return content[:footer] + body + len(body).to_bytes(4, "little") + b"PAR1"


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def _page_data(content: bytes) -> list[tuple[int, int]]:
    """Return the bytes of each page without its header."""
    metadata = pq.read_metadata(io.BytesIO(content))
    pages = []
    groups = [metadata.row_group(g) for g in range(metadata.num_row_groups)]
    for group in groups:
        for j in range(group.num_columns if group.num_rows else 0):
            column = group.column(j)
            place = min(column.data_page_offset, column.dictionary_page_offset or 1 << 62)
            end = place + column.total_compressed_size
            while place < end:
                place, fields = _read_struct(content, place)
                pages.append((place, place + fields[3]))
                place += fields[3]
    return pages


def _read_struct(data: bytes, place: int) -> tuple[int, dict[int, int]]:
    """Read a struct of Thrift's compact protocol: where it ends, and its integers."""
    fields, number = {}, 0
    while data[place]:
        head = data[place]
        place += 1
        if head >> 4:
            number += head >> 4
        else:
            place, number = _read_zigzag(data, place)
        place, fields[number] = _read_value(data, place, head & 15)
    return place + 1, fields


def _read_value(data: bytes, place: int, kind: int) -> tuple[int, int]:
    if kind in (1, 2):
        return place, kind
    if kind in (4, 5, 6):
        return _read_zigzag(data, place)
    if kind == 8:
        end, length = _read_varint(data, place)
        return end + length, length
    if kind == 12:
        return _read_struct(data, place)[0], 0
    raise ValueError(f"Thrift type {kind} is not in page headers")


def _read_varint(data: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[place]
        value |= (byte & 127) << shift
        place, shift = place + 1, shift + 7
        if byte < 128:
            return place, value


def _read_zigzag(data: bytes, place: int) -> tuple[int, int]:
    place, value = _read_varint(data, place)
    return place, (value >> 1) ^ -(value & 1)
