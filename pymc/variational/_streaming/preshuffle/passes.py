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
"""The two passes of a shuffle on disk: which tasks are left to do, and who runs them."""

import contextlib
import dataclasses
import uuid

from collections.abc import Callable, Iterable
from concurrent.futures import Executor, Future, as_completed, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pymc.variational._streaming.errors import StreamError
from pymc.variational._streaming.preshuffle.dictionaries import (
    read_dictionaries,
    write_dictionaries,
)
from pymc.variational._streaming.preshuffle.piles import PileFile, write_catalog
from pymc.variational._streaming.preshuffle.plan import Plan
from pymc.variational._streaming.preshuffle.staging import Staging
from pymc.variational._streaming.preshuffle.tasks import (
    Gathered,
    GatherTask,
    Scattered,
    ScatterTask,
    Scratch,
    gather,
    scatter,
)
from pymc.variational._streaming.sources.parquet.files import import_pyarrow
from pymc.variational._streaming.sources.parquet.mark import PreshuffleMark

if TYPE_CHECKING:
    import pyarrow.fs

__all__ = ["Passes", "add_checksums"]


@dataclass(frozen=True, slots=True)
class Passes:
    """The tasks of one plan, those of earlier runs included."""

    plan: Plan
    staging: Staging
    pool: Executor
    advance: Callable[[int], None]
    scratch_fs: "pyarrow.fs.FileSystem"
    folder: str

    @property
    def scratch(self) -> Scratch:
        plan = self.plan
        return Scratch(
            fs=self.scratch_fs,
            folder=self.folder,
            schema=plan.plain,
            at_once=plan.at_once,
            block_bytes=plan.block_bytes,
            batch_rows=plan.batch_rows,
            seed=plan.seed,
        )

    def place(self, index: int) -> tuple[str, str | None]:
        """Return where a file belongs, and where to draft it."""
        return self.staging.place(f"part-{index:05}-of-{self.plan.n_files:05}.parquet", index)

    def run(self) -> tuple[dict[int, Scattered], dict[int, Gathered]]:
        """Run all tasks that no earlier run has done, and return the results of all."""
        recorded = {i: Gathered(**r) for i, r in self.staging.results("gather").items()}
        infos = self.staging.fs.get_file_info([self.place(i)[0] for i in recorded])
        there = zip(recorded.items(), infos)
        gathered = {i: r for (i, r), info in there if info.size == r.size}
        self._count(gathered)
        scattered = self._scatter_all(files_needed=len(gathered) < self.plan.n_files)
        return scattered, gathered | self._gather_rest(scattered, gathered)

    def _scatter_all(self, *, files_needed: bool) -> dict[int, Scattered]:
        """Run what is left of the first pass; redo tasks whose files are gone but needed."""
        done = {i: _scattered(r) for i, r in self.staging.results("scatter").items()}
        if files_needed:
            infos = self.scratch_fs.get_file_info([result.piles.path for result in done.values()])
            there = zip(done.items(), infos)
            done = {i: r for (i, r), info in there if info.size == r.piles.size}
            self._delete_all_but(done)
        self._count(done)
        table = self.plan.table
        return done | self._run(
            "scatter",
            scatter,
            {
                index: ScatterTask(
                    index, table.fs, pieces, table.columns, self.plan.n_piles, self.scratch
                )
                for index, pieces in enumerate(self.plan.scatter)
                if index not in done
            },
        )

    def _delete_all_but(self, done: dict[int, Scattered]) -> None:
        """Delete scatter files that a killed run left unfinished."""
        known = {path for r in done.values() for path in (r.piles.path, r.dictionaries) if path}
        names = {path.rpartition("/")[2] for path in known}
        selector = import_pyarrow().fs.FileSelector(self.folder)
        for info in self.scratch_fs.get_file_info(selector):
            if info.base_name not in names:
                self.scratch_fs.delete_file(info.path)

    def _gather_rest(
        self, scattered: dict[int, Scattered], done: dict[int, Gathered]
    ) -> dict[int, Gathered]:
        """Run what is left of the second pass."""
        left = [index for index in range(self.plan.n_files) if index not in done]
        if not left:
            return {}
        catalog = f"{self.folder}/{uuid.uuid4().hex}.catalog"
        in_order = [scattered[index] for index in sorted(scattered)]
        write_catalog(self.scratch_fs, catalog, [result.piles for result in in_order])
        task = GatherTask(
            index=0,
            piles=range(0),
            catalog=catalog,
            dictionaries=self._merge_dictionaries(in_order),
            scratch=self.scratch,
            fs=self.staging.fs,
            path="",
            draft=None,
            schema=self.plan.table.schema,
            compression=self.plan.compression,
            row_group_rows=self.plan.row_group_rows,
            mark=_mark(self.plan, in_order),
        )
        tasks = {}
        piles, step = range(self.plan.n_piles), self.plan.piles_per_file
        for index in left:
            path, draft = self.place(index)
            tasks[index] = dataclasses.replace(
                task,
                index=index,
                piles=piles[index * step : (index + 1) * step],
                path=path,
                draft=draft,
            )
        return self._run("gather", gather, tasks)

    def _merge_dictionaries(self, scattered: list[Scattered]) -> str | None:
        """Join the dictionaries of all files; they must fit in memory."""
        paths = [result.dictionaries for result in scattered if result.dictionaries]
        if not paths:
            return None
        merged = read_dictionaries(self.scratch_fs, paths)
        if merged.nbytes > self.plan.block_bytes:
            raise StreamError(
                f"dictionary columns {list(merged.values)} have {merged.nbytes} bytes of distinct "
                f"values, memory_limit leaves {self.plan.block_bytes}; raise it, or decode them"
            )
        path = f"{self.folder}/{uuid.uuid4().hex}.dictionaries"
        write_dictionaries(self.scratch_fs, path, merged.values)
        return path

    def _run(self, kind: str, function: Callable, tasks: dict[int, Any]) -> dict[int, Any]:
        """Run tasks, and record each that is done; if one fails, none of the others starts."""
        futures: dict[Future, int] = {}
        results: dict[int, Any] = {}
        try:
            for index, task in tasks.items():
                futures[self.pool.submit(function, task)] = index
            for future in as_completed(futures):
                index = futures[future]
                results[index] = future.result()
                self._record(kind, index, results[index])
        except BaseException as err:
            self._stop(kind, {f: index for f, index in futures.items() if index not in results})
            if isinstance(err, StreamError) or not isinstance(err, Exception):
                raise
            raise StreamError(
                f"preshuffle stopped ({_first_line(err)}); nothing was published; finished tasks "
                f"are kept in {self.staging.work}: remove the cause and run the same call again"
            ) from err
        return results

    def _stop(self, kind: str, futures: dict[Future, int]) -> None:
        """Let no more tasks start, and record those that come to a good end."""
        for future in futures:
            future.cancel()
        wait(futures)
        self.staging.check_owner()
        with contextlib.suppress(OSError):
            for future, index in futures.items():
                if not future.cancelled() and future.exception() is None:
                    self._record(kind, index, future.result())

    def _record(self, kind: str, index: int, result: Scattered | Gathered) -> None:
        self.staging.record(kind, index, dataclasses.asdict(result))
        self.advance(result.rows)

    def _count(self, done: dict[int, Any]) -> None:
        self.advance(sum(result.rows for result in done.values()))


def add_checksums(results: Iterable[Scattered | Gathered]) -> int:
    """Return the checksum of the rows of all tasks together."""
    return sum(result.checksum for result in results) % (1 << 64)


def _first_line(err: Exception) -> str:
    return f"{type(err).__name__}: {str(err).strip().partition(chr(10))[0]}"


def _scattered(values: dict[str, Any]) -> Scattered:
    return Scattered(**{**values, "piles": PileFile(**values["piles"])})


def _mark(plan: Plan, scattered: list[Scattered]) -> PreshuffleMark:
    return PreshuffleMark(
        shuffle=plan.shuffle,
        seed=plan.seed,
        source=plan.table.name,
        fingerprint=plan.table.fingerprint,
        n_rows=plan.table.n_rows,
        n_files=plan.n_files,
        index=0,
    )
