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
"""How many rows the tasks of a shuffle hold, so that they fit in memory.

The plan follows from the source, the seed and the memory limit alone, so that the result is the
same on any number of workers.
"""

import math
import re

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from pymc.variational._streaming.sources.parquet.files import pa
from pymc.variational._streaming.sources.rows import PIECE_ROWS
from pymc.variational._streaming.sources.tables import Batches, Files, conform, plain_schema

__all__ = ["MAX_AT_ONCE", "MAX_PARTITIONS", "Part", "Plan", "cut_parts", "make_plan", "parse_bytes"]

MAX_AT_ONCE = 4
"""Tasks that may run in one process at once, and so share its memory limit."""
MAX_PARTITIONS = 1 << 12
"""Partitions of one scatter; a message of fewer rows would cost more than its rows."""
_COPIES = 6
"""A task's rows in memory: as read, joined, in their new order, and encoded."""
_PROCESS_OVERHEAD = 32 << 20
_TASK_OVERHEAD = 44 << 20
"""Bytes that do not grow with the rows: code, buffers, and what the allocator keeps."""
_SMALLEST_BLOCK = 1 << 20
_GOOD_BLOCK = 1 << 23
"""Bytes.  Fewer tasks at once are better than smaller ones."""
_LARGEST_BLOCK = 1 << 30
"""Bytes.  An Arrow string array holds less than twice as much."""
_BATCH_BYTES = 1 << 20
_BATCH_ROWS = 1 << 16
_FEWEST_TASKS = 16
"""Tasks per pass for tables of more than a few megabytes, to keep many workers busy."""
_FILES = 8
"""The files of a result are a multiple of these, so that no worker is left without one."""
_SMALL_TASK = 1 << 22
_LARGE_TASK = 1 << 26
"""Bytes of rows that a scatter task reads, or a file of the result holds, where there are many;
opening a file takes longer than reading a row group."""
_UNKNOWN_BLOCKS = 64
"""Size of a source whose number of rows is not known, in blocks."""
_ROW_GROUP_BYTES = 1 << 23
"""Largest row group; nor has it more rows than a source reads at a time."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What all tasks of a shuffle share."""

    schema: "pa.Schema"
    """Schema of the result."""
    plain: "pa.Schema"
    """The columns in types that can be taken apart by rows."""
    seed: int
    task_rows: int
    """Rows that a task of the first pass reads, or some more."""
    n_partitions: int
    at_once: int
    """Tasks in one process."""
    block_bytes: int
    """Rows that a task may hold, not counting copies."""
    batch_rows: int
    row_group_rows: int


@dataclass(frozen=True, slots=True)
class Part:
    """A file of the result."""

    folder: str
    """Name of its part of a split; empty without a split."""
    index: int
    """Position among the files in its folder."""
    pieces: tuple[tuple[int, int, int], ...]
    """A partition, and the first and last row of it, exclusive, for each piece of the file."""

    @property
    def n_rows(self) -> int:
        return sum(stop - start for _, start, stop in self.pieces)


def parse_bytes(value: int | str) -> int:
    """Read a number of bytes, such as ``"512MB"``, ``"2 GiB"`` or 10**9."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([KMGT]?)(I?)B?\s*", str(value).upper())
    if not match:
        raise ValueError(
            f"memory_limit={value!r} is not a size; pass bytes or a string like '512MB'"
        )
    return int(float(match[1]) * (1024 if match[3] else 1000) ** " KMGT".index(match[2] or " "))


def make_plan(table: Files | Batches, *, seed: int, memory_limit: int) -> Plan:
    """Choose how many rows a task holds."""
    if table.n_rows == 0:
        raise ValueError(f"source={table.name!r} holds no rows; there is nothing to shuffle")
    plain = plain_schema(table.schema)
    sampled = [conform(batch, plain, where) for where, batch in table.sample(_BATCH_BYTES)]
    in_memory = max(1.0, sum(b.nbytes / b.num_rows for b in sampled) / len(sampled))
    widest = max(table.row_bytes, in_memory)
    at_once, block = _share(memory_limit, len(plain), widest, table.page_bytes)
    total = _UNKNOWN_BLOCKS * block if table.n_rows is None else table.n_rows * in_memory
    n_tasks = min(_FEWEST_TASKS, math.ceil(total / _SMALL_TASK))
    # Partitions are of random sizes; with some space, few of them are larger than a block.
    n_partitions = min(max(n_tasks, math.ceil(1.2 * total / block)), MAX_PARTITIONS)
    return Plan(
        schema=table.schema,
        plain=plain,
        seed=seed,
        task_rows=max(1, int(min(_LARGE_TASK, total / n_tasks) / in_memory)),
        n_partitions=n_partitions,
        at_once=at_once,
        block_bytes=block,
        batch_rows=max(1, min(_BATCH_ROWS, int(min(_BATCH_BYTES, block / 4) / widest))),
        row_group_rows=max(1, min(int(min(_ROW_GROUP_BYTES, block) / in_memory), PIECE_ROWS)),
    )


def cut_parts(
    partition_rows: Sequence[int], split: dict[str, float], row_bytes: float
) -> list[Part]:
    """Cut the permutation of all rows, partition after partition, into the files of the result.

    A part of a split is a run of this permutation, and so a random sample of the rows, of exactly
    the size that was asked for.
    """
    n_rows, parts, start, share = sum(partition_rows), [], 0, 0.0
    whole = sum(split.values())  # 1, but for what floats lose
    for folder, fraction in split.items():
        share += fraction
        stop = round(share / whole * n_rows)
        pieces = list(_pieces(partition_rows, start, stop))
        if not pieces:
            raise ValueError(
                f"split={split} leaves {folder!r} without rows, of {n_rows}; give it a larger part"
            )
        rounds = math.ceil((stop - start) * row_bytes / (_FILES * _LARGE_TASK))
        n_files = min(_FILES * rounds, len(pieces))
        ends = [len(pieces) * index // n_files for index in range(n_files + 1)]
        for index, (first, last) in enumerate(pairwise(ends)):
            parts.append(Part(folder, index, tuple(pieces[first:last])))
        start = stop
    return parts


def _pieces(partition_rows: Sequence[int], start: int, stop: int):
    """Yield which rows of each partition lie between two places of the permutation."""
    end = 0
    for partition, rows in enumerate(partition_rows):
        first, end = end, end + rows
        if max(first, start) < min(end, stop):
            yield partition, max(first, start) - first, min(end, stop) - first


def _share(limit: int, n_columns: int, widest: float, page_bytes: int) -> tuple[int, int]:
    """Return how many tasks may run at once, and how many bytes of rows each may hold."""
    available = limit - _PROCESS_OVERHEAD
    overhead = _TASK_OVERHEAD + page_bytes
    smallest = max(_SMALLEST_BLOCK, math.ceil(4 * widest))
    at_once = MAX_AT_ONCE
    while at_once > 1 and available // at_once < overhead + _COPIES * max(smallest, _GOOD_BLOCK):
        at_once -= 1
    block = (available // at_once - overhead) // _COPIES
    if block < smallest:
        enough = math.ceil((_PROCESS_OVERHEAD + overhead + _COPIES * smallest) / 10**6)
        raise ValueError(
            f"memory_limit={limit} is too small for {n_columns} columns in rows of up to "
            f"{math.ceil(widest)} bytes; pass at least memory_limit='{enough}MB'"
        )
    return at_once, min(block, _LARGEST_BLOCK)
