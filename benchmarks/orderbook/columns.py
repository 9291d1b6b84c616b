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

It looks at the files' footers and at the first rows, and imports no more than that takes;
`exact_posterior` holds all rows to the same.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

__all__ = ["LARGEST", "MESSAGES", "choose", "holds_messages", "parquet_files", "visible_files"]

LARGEST = 1e6
"""A coefficient of some 1e-6 is far below its prior's scale, and float steps would not find it."""
MESSAGES = ".ndjson", ".ndjson.gz", ".ndjson.zst", ".jsonl", ".jsonl.gz", ".jsonl.zst"
"""How the names of files of messages in JSON end."""


def visible_files(directory: Path, endings: tuple[str, ...], remedy: str) -> list[Path]:
    """List the files below *directory* whose names end so and are not hidden, as by ``._``."""
    visible = [f for f in sorted(directory.rglob("*")) if f.is_file() and f.name[0] != "."]
    if files := [file for file in visible if file.name.endswith(endings)]:
        return files
    kinds = Counter("".join(file.suffixes[-2:]) or file.name for file in visible)
    holds = ", ".join(f"{n} {kind}" for kind, n in kinds.most_common(5)) or "no files"
    raise FileNotFoundError(f"no {remedy} in {directory}; it holds {holds}")


def parquet_files(rows: Path) -> list[Path]:
    """List the Parquet files of a table in order."""
    return visible_files(rows, (".parquet",), "Parquet files and no messages")


def holds_messages(data: Path) -> bool:
    """Tell order-book messages from a table of rows."""
    if any(f.name.endswith(MESSAGES) for f in data.rglob("*") if f.name[0] != "."):
        return True
    return _first_rows(data).schema.names[:2] == ["kind", "side"]


def choose(rows: Path, *, features: Sequence[str] | None, label: str) -> tuple[str, ...]:
    """Return the columns of *rows* to fit, the label last; refuse what cannot be fitted.

    By default the last column is the label, and all others are features.
    """
    table = _first_rows(rows)
    names = table.schema.names
    label = label or names[-1]
    chosen = [name for name in names if name != label] if features is None else [*features]
    if unknown := [name for name in (*chosen, label) if name not in names]:
        raise ValueError(f"{rows} has no column {unknown[0]!r}; it has {', '.join(names)}")
    if label in chosen or not chosen:
        raise ValueError(f"{rows}: the label {label!r} must not be a feature, and one is needed")
    if wrong := {name: fault for name in chosen if (fault := _fault(table[name]))}:
        listed = "; ".join(f"{name!r} {fault}" for name, fault in wrong.items())
        good = ",".join(name for name in chosen if name not in wrong) or "..."
        raise ValueError(f'{rows}: {listed}; leave such columns out: FEATURES="{good}"')
    if not _is_binary(table[label]):
        others = [name for name in names if name != label and _is_binary(table[name])]
        remedy = f"choose it: LABEL={others[0]}" if others else "add a column of 0 and 1"
        raise ValueError(f"{rows}: the label {label!r} must hold only 0 and 1; {remedy}")
    return (*chosen, label)


def _first_rows(rows: Path) -> pa.RecordBatch:
    """Read the first rows of a table, all files of which have the same columns."""
    first, *others = files = parquet_files(rows)
    names = {file: _names(file) for file in files}
    for file in others:
        if {*names[file]} != {*names[first]}:
            raise ValueError(
                f"{file} must have the columns of {first}, {', '.join(names[first])}; "
                f"it has {', '.join(names[file])}"
            )
    for file in files:
        with pq.ParquetFile(file) as parquet:
            for batch in parquet.iter_batches():
                if len(batch):
                    return batch.select(names[first])
    raise ValueError(f"{rows} holds no rows")


def _names(file: Path) -> list[str]:
    try:
        return pq.read_schema(file).names
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{file} is not a Parquet file that can be read: {error}") from None


def _fault(column: pa.Array) -> str:
    """Say why a column cannot be a feature."""
    kind = column.type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
        return f"is {kind}, not a number"
    if column.null_count:
        return "holds nulls"
    largest = np.abs(column.to_numpy(zero_copy_only=False).astype(float)).max()
    if largest > LARGEST:
        return f"({kind}) reaches {largest:.2g}, too large for a coefficient ~ Normal(0, 3)"
    return ""


def _is_binary(column: pa.Array) -> bool:
    return not _fault(column) and {*column.unique().to_pylist()} <= {0, 1}
