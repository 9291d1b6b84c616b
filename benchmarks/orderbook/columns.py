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
"""Which columns of a table are features, and which is the label.

>>> choose(Path("rows"), features=None, label=None)
('mid', 'spread', 'imbalance', 'up')

It looks at the files' footers, and imports no more than that takes.
"""

import re

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

__all__ = ["choose", "holds_messages", "parquet_files"]

LARGEST = 1e6
"""A coefficient of some 1e-6 is far below its prior's scale, and float steps would not find it."""
MESSAGES = re.compile(r"\.(ndjson|jsonl)(\.gz|\.zst)?$")


def parquet_files(rows: Path) -> list[Path]:
    """List the Parquet files of a table in order."""
    files = sorted(file for file in rows.rglob("*.parquet") if not file.name.startswith("."))
    if not files:
        found = sorted({file.suffix or file.name for file in rows.rglob("*") if file.is_file()})
        holds = f"files of type {', '.join(found[:5])}" if found else "no files"
        raise SystemExit(f"{rows} holds no Parquet files and no messages; it holds {holds}")
    return files


def holds_messages(data: Path) -> bool:
    """Tell order-book messages from a table of rows."""
    if any(MESSAGES.search(file.name) for file in data.rglob("*") if file.name[0] != "."):
        return True
    return _Table(data).names[:2] == ["kind", "side"]


def choose(rows: Path, *, features: Sequence[str] | None, label: str | None) -> tuple[str, ...]:
    """Return the columns to fit, the label last.

    Parameters
    ----------
    rows : Path
        Directory of Parquet files.
    features : sequence of str, optional
        Default: all columns but the label.
    label : str, optional
        Default: the last column.

    Raises
    ------
    SystemExit
        If the model cannot be fitted to them.
    """
    table = _Table(rows)
    label = label or table.names[-1]
    chosen = [name for name in table.names if name != label] if features is None else [*features]
    if unknown := [name for name in (*chosen, label) if name not in table.names]:
        raise SystemExit(f"{rows} has no column {unknown[0]!r}; it has {', '.join(table.names)}")
    if label in chosen or not chosen:
        raise SystemExit(f"{rows}: the label {label!r} must not be a feature, and one is needed")
    if wrong := {name: fault for name in chosen if (fault := table.fault(name))}:
        listed = "; ".join(f"{name!r} {fault}" for name, fault in wrong.items())
        good = ",".join(name for name in chosen if name not in wrong) or "..."
        raise SystemExit(f'{rows}: {listed}; leave such columns out: FEATURES="{good}"')
    if not table.is_binary(label):
        others = [name for name in table.names if name != label and table.is_binary(name)]
        remedy = f"choose it: LABEL={others[0]}" if others else "add a column of 0 and 1"
        raise SystemExit(f"{rows}: the label {label!r} must hold only 0 and 1; {remedy}")
    return (*chosen, label)


class _Table:
    """The footers of a table's files."""

    def __init__(self, rows: Path) -> None:
        self.footers = {}
        for file in parquet_files(rows):
            try:
                self.footers[file] = pq.read_metadata(file)
            except (pa.ArrowException, OSError) as error:
                raise SystemExit(
                    f"{file} is not a Parquet file that can be read: {error}"
                ) from None
        first, *others = self.footers
        self.schema = self.footers[first].schema.to_arrow_schema()
        self.names = self.schema.names
        for file in others:
            names = self.footers[file].schema.to_arrow_schema().names
            if {*names} != {*self.names}:
                raise SystemExit(
                    f"{file} must have the columns of {first}, {', '.join(self.names)}; "
                    f"it has {', '.join(names)}"
                )
        if not any(footer.num_rows for footer in self.footers.values()):
            raise SystemExit(f"{rows} holds no rows")

    def fault(self, name: str) -> str:
        """Say why a column cannot be a feature."""
        kind = self.schema.field(name).type
        if not _is_number(kind):
            return f"is {kind}, not a number"
        least, most, n_nulls = self._range(name)
        if n_nulls:
            return "holds nulls"
        if (largest := max(-least, most)) > LARGEST:
            return f"({kind}) reaches {largest:.2g}, too large for a coefficient ~ Normal(0, 3)"
        return ""

    def is_binary(self, name: str) -> bool:
        if not _is_number(self.schema.field(name).type):
            return False
        least, most, n_nulls = self._range(name)
        if not 0 <= least <= most <= 1 or n_nulls:
            return False
        file = next(file for file, footer in self.footers.items() if footer.num_rows)
        with pq.ParquetFile(file) as parquet:
            values = pc.unique(parquet.read_row_group(0, [name])[name]).to_pylist()
        return {*values} <= {0, 1}

    def _range(self, name: str) -> tuple[float, float, int]:
        """Return the least and the largest value, and the nulls, as far as the footers tell."""
        ends, n_nulls = [], 0
        for file, footer in self.footers.items():
            at = footer.schema.to_arrow_schema().names.index(name)
            for number in range(footer.num_row_groups):
                statistics = footer.row_group(number).column(at).statistics
                if statistics is not None and statistics.has_min_max:
                    ends += [float(statistics.min), float(statistics.max)]
                    n_nulls += statistics.null_count or 0
                elif not ends:
                    column = pq.ParquetFile(file).read_row_group(number, [name])[name]
                    bounds = pc.min_max(column.cast(pa.float64()))
                    ends += [bounds["min"].as_py() or 0.0, bounds["max"].as_py() or 0.0]
                    n_nulls += column.null_count
        return min(ends, default=0.0), max(ends, default=0.0), n_nulls


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)
