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
"""How fast ``preshuffle`` is, beside DuckDB's random order and a plain copy of the same files.

    python -m benchmarks.preshuffle_speed --page docs/source/speed.md

The table is that of the order books, in order of time.  The three take turns, so that whatever
else the machine does meets all of them.  DuckDB gets the same memory limit and as many threads
as ``preshuffle`` has; the copy reads each file whole and writes it with lz4 and without
dictionaries, without any limit.  Needs ``duckdb``.
"""

import shutil
import statistics
import time

from pathlib import Path

import pyarrow.parquet as pq

from benchmarks.data import Data
from benchmarks.pages import markdown, measure
from pymc.variational.streaming import preshuffle

THREADS = 2
MEMORY_LIMIT = "512MB"
COMMAND = "python -m benchmarks.preshuffle_speed"
ENCODING = {
    "compression": "lz4",
    "use_dictionary": False,
    "write_statistics": False,
    "write_page_checksum": True,
}


def shuffling_table(data: Data, turns: int) -> str:
    book, target = data.order_book(), data.folder / "result"
    ways = {
        "preshuffle": shuffle_ours,
        "DuckDB, ORDER BY random()": shuffle_duckdb,
        "plain copy": copy_plain,
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(1 + turns):  # the first warms up
        for name, run in ways.items():
            start = time.perf_counter()
            run(book, target, MEMORY_LIMIT)
            seconds[name].append(time.perf_counter() - start)
            shutil.rmtree(target)
    lines = []
    for name, theirs in seconds.items():
        ours, theirs = seconds["preshuffle"][1:], theirs[1:]
        median, ratio = map(statistics.median, (theirs, [b / a for a, b in zip(ours, theirs)]))
        spread = f"{median:.2f} ({min(theirs):.2f} to {max(theirs):.2f})"
        lines.append([name, spread, f"{data.n_rows / median / 1e6:.1f}", f"{ratio:.2f}"])
    heads = "seconds, median (least to most) | million rows/s | time over preshuffle's"
    return markdown(f"{data.n_rows:,} rows | {heads}", lines)


def shuffle_ours(source: Path, target: Path, memory_limit: str) -> None:
    preshuffle(source, target, seed=0, memory_limit=memory_limit, progressbar=False)


def shuffle_duckdb(source: Path, target: Path, memory_limit: str) -> None:
    import duckdb

    target.mkdir()
    settings = {"memory_limit": memory_limit, "threads": str(THREADS)}
    with duckdb.connect(config={**settings, "temp_directory": str(target)}) as connection:
        connection.execute("SET enable_progress_bar = false")
        connection.execute(
            f"COPY (SELECT * FROM '{source}/*.parquet' ORDER BY random()) "
            f"TO '{target}/all.parquet' (FORMAT parquet, COMPRESSION lz4_raw)"
        )


def copy_plain(source: Path, target: Path, memory_limit: str) -> None:
    target.mkdir()
    for file in sorted(source.iterdir()):
        pq.write_table(pq.read_table(file), target / file.name, **ENCODING)


if __name__ == "__main__":
    measure(COMMAND, {"shuffling": shuffling_table}, rows=16e6, turns=9)
