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
"""Tables, small tasks and an executor for the tests of `preshuffle`, and what came of them."""

import datetime
import decimal
import hashlib

from collections.abc import Callable
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pymc.variational._streaming.preshuffle import plan
from pymc.variational.streaming import PreshuffleReport, preshuffle


class Inline(Executor):
    """Runs each task where it is submitted, after a call of *before* with the task's number."""

    def __init__(self, before: Callable[[int], None]):
        self._before = before
        self._n_tasks = 0

    def submit(self, function, *args):
        future: Future = Future()
        try:
            self._before(self._n_tasks)
            self._n_tasks += 1
            future.set_result(function(*args))
        except Exception as err:
            future.set_exception(err)
        return future


def cut_small(
    monkeypatch_or_module, *, block: int = 1 << 14, tasks: int = 16, files: int | None = None
) -> None:
    """Let tables of kilobytes be cut into as many tasks as those of gigabytes are."""
    for name, value in {
        "_SMALL_TASK": 1,
        "_SMALLEST_BLOCK": 1,
        "_LARGEST_BLOCK": block,
        "_FEWEST_TASKS": tasks,
        "_FILES": files or tasks,
        "_BATCH_BYTES": block // 4,
    }.items():
        monkeypatch_or_module(plan, name, value)


def numbered(folder: Path, n_rows: int, n_files: int = 1, row_group_size: int = 100) -> Path:
    """Write rows that tell their own position to a new folder, and return it."""
    folder.mkdir()
    for number, rows in enumerate(np.array_split(np.arange(n_rows), n_files)):
        table = pa.table({"row": rows, "twice": 2.0 * rows})
        pq.write_table(table, folder / f"{number}.parquet", row_group_size=row_group_size)
    return folder


def shuffle(source: Any, destination: Path, **options: Any) -> PreshuffleReport:
    return preshuffle(source, destination, **({"seed": 0, "progressbar": False} | options))


def every_type(n: int) -> pa.Table:
    """Return a table with a column of each type that Parquet can hold, and with nulls."""
    rng = np.random.default_rng(1)
    holes = rng.random(n) < 0.2
    numbers = rng.integers(0, 100, n)
    columns = {"row": pa.array(np.arange(n))}
    columns |= _numbers(numbers, holes) | _text(numbers, holes) | _nested(numbers, holes)
    fields = [
        pa.field(name, column.type, metadata={"unit": name}) for name, column in columns.items()
    ]
    return pa.table(list(columns.values()), pa.schema(fields, {"origin": "a test"}))


def rows_in_order(folder: Path, key: str = "row") -> list[int]:
    """Return one column of a result, in the order of its files."""
    files = sorted(folder.glob("*.parquet"))
    return [value for file in files for value in pq.read_table(file)[key].to_pylist()]


def digests(folder: Path) -> dict[str, str]:
    """Return a digest of the bytes of each file."""
    return {
        p.name: hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.iterdir())
        if p.is_file()
    }


_INTEGERS = [
    *(pa.int8(), pa.int16(), pa.int32(), pa.int64()),
    *(pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64()),
]
_FLOATS = [pa.float32(), pa.float64()]
_TIMES = [pa.time64("us"), pa.timestamp("ns", "UTC"), pa.duration("us")]


def _numbers(numbers: np.ndarray, holes: np.ndarray) -> dict[str, pa.Array]:
    decimals = [decimal.Decimal(int(k)) / 100 for k in numbers]
    days = [datetime.date(2026, 1, 1) + datetime.timedelta(int(k)) for k in numbers]
    return {
        **{str(t): pa.array(numbers, t, mask=holes) for t in _INTEGERS},
        **{str(t): pa.array(numbers.astype("f4"), mask=holes).cast(t) for t in _FLOATS},
        "bool": pa.array(numbers % 2 == 0, mask=holes),
        "null": pa.nulls(len(numbers)),
        "half": pa.array(numbers.astype("f2"), mask=holes),
        "decimal": _holed(decimals, holes, pa.decimal128(10, 2)),
        "decimal256": _holed(decimals, holes, pa.decimal256(50, 2)),
        "date": _holed(days, holes, pa.date32()),
        **{str(t): _holed(numbers.tolist(), holes, t) for t in _TIMES},
    }


def _text(numbers: np.ndarray, holes: np.ndarray) -> dict[str, pa.Array]:
    words = [f"word-{k * k}" * int(k % 4) for k in numbers]
    levels = pa.array(numbers % 3, pa.int8(), mask=holes), ["low", "mid", "high", "never"]
    return {
        "string": _holed(words, holes, pa.string()),
        "large string": _holed(words, holes, pa.large_string()),
        "binary": _holed([w.encode() for w in words], holes, pa.binary()),
        "fixed binary": _holed([b"%03d" % k for k in numbers], holes, pa.binary(3)),
        "dictionary": _holed(words, holes, pa.string()).dictionary_encode(),
        "ordered": pa.DictionaryArray.from_arrays(*levels, ordered=True),
    }


def _nested(numbers: np.ndarray, holes: np.ndarray) -> dict[str, pa.Array]:
    lists = [list(range(k % 5)) for k in numbers]
    structs = [{"x": int(k), "y": {"z": str(k)}} for k in numbers]
    struct = pa.struct({"x": pa.int32(), "y": pa.struct({"z": pa.string()})})
    texts = [[str(i) for i in v] for v in lists]
    deep = [[v, None, v] for v in lists]
    maps = [[(str(k), int(k))] for k in numbers]
    return {
        "list": _holed(lists, holes, pa.list_(pa.int16())),
        "large list": _holed(texts, holes, pa.large_list(pa.string())),
        "fixed list": pa.array([[1.5 * k, None] for k in numbers], pa.list_(pa.float32(), 2)),
        "list of lists": _holed(deep, holes, pa.list_(pa.list_(pa.int8()))),
        "struct": _holed(structs, holes, struct),
        "map": _holed(maps, holes, pa.map_(pa.string(), pa.int64())),
    }


def _holed(values: list, holes: np.ndarray, kind: pa.DataType) -> pa.Array:
    return pa.array([None if hole else v for v, hole in zip(values, holes)], kind)
