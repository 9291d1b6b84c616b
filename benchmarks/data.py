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
"""Tables that benchmarks read, each written when it is first asked for.

>>> data = Data(folder, 20_000_000)
>>> data.shuffled(data.order_book())
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import tests  # noqa: F401  # puts the checkout before an installed wheel

from benchmarks.orderbook.publish import published
from pymc.variational.streaming import preshuffle

__all__ = ["N_GROUPS", "WIDE", "Data", "write_columns"]

WIDE = 64
N_GROUPS = 500
ROWS_PER_FILE = 500_000


class Data:
    """Tables in one folder.

    Parameters
    ----------
    folder : Path
        What it holds already is not written again.
    n_rows : int
        Of a table, unless another number is asked for.
    """

    def __init__(self, folder: Path, n_rows: int):
        self.folder = folder
        self.n_rows = n_rows

    def order_book(self, n_rows: int | None = None) -> Path:
        """Four columns in order of time."""
        n_rows = n_rows or self.n_rows
        return self.table(f"book-{n_rows}", partial(_write_book, n_rows))

    def wide(self, width: int = WIDE) -> Path:
        """Columns of float32, the last one 0 or 1; as many numbers as 64 of a tenth of the rows."""
        n_rows = self.n_rows // 10 * WIDE // width
        write = partial(write_columns, n_rows, partial(_wide_columns, width=width))
        return self.table(f"wide-{width}-{n_rows}", write)

    def groups(self) -> Path:
        """Number of a group, x and y."""
        write = partial(write_columns, self.n_rows, _group_columns)
        return self.table(f"groups-{self.n_rows}", write)

    def shuffled(self, table: Path, format: Literal["parquet", "arrow"] = "parquet") -> Path:
        """Give what ``preshuffle`` makes of a table."""
        # A page of each of 256 columns alone takes more than the default limit.
        shuffle = partial(
            preshuffle, table, seed=0, format=format, memory_limit="1GB", progressbar=False
        )
        suffix = "" if format == "parquet" else f"-{format}"
        return self.table(f"{table.name}-shuffled{suffix}", shuffle)

    def table(self, name: str, write: Callable[[Path], object]) -> Path:
        """Give a table that is written unless it is there."""
        if not (self.folder / name).exists():
            write(self.folder / name)
        return self.folder / name


def _write_book(n_rows: int, folder: Path) -> None:
    # The simulator takes seconds to import, and every benchmark is a process of its own.
    from benchmarks.orderbook.rows import write_rows

    write_rows(folder, rows=n_rows, seed=0)


def write_columns(n_rows: int, columns: Callable[..., dict], folder: Path) -> None:
    """Write what a function makes of a random generator and the numbers of a file's rows."""
    rng = np.random.default_rng(0)
    with published(folder, overwrite=False) as (content, _):
        for first in range(0, n_rows, ROWS_PER_FILE):
            table = pa.table(columns(rng, np.arange(first, min(first + ROWS_PER_FILE, n_rows))))
            pq.write_table(table, content / f"part-{first:010}.parquet")


def _wide_columns(
    rng: np.random.Generator, numbers: np.ndarray, width: int
) -> dict[str, np.ndarray]:
    n = len(numbers)
    # The logit of a fit's first step has the same size for any width; else its density overflows.
    x = rng.normal(scale=(WIDE / width) ** 0.5, size=(width - 1, n)).astype("float32")
    up = rng.random(n) < 1 / (1 + np.exp(-x[:5].sum(axis=0)))
    return {**{f"x{j}": column for j, column in enumerate(x)}, "up": up.astype("float32")}


def _group_columns(rng: np.random.Generator, numbers: np.ndarray) -> dict[str, np.ndarray]:
    n = len(numbers)
    group, x = rng.integers(N_GROUPS, size=n, dtype="int16"), rng.normal(size=n)
    y = group / N_GROUPS + 0.5 * x + rng.normal(size=n)
    return {"group": group, "x": x.astype("float32"), "y": y.astype("float32")}
