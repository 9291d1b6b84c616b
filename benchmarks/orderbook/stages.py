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
"""Run the stages of a long experiment one after another, and go on where a run was stopped.

>>> rows = Stage("1M", "rows", make_rows, {"rows": 1_000_000}, product=folder / "rows")
>>> fitted = Stage("1M", "fit", fit_rows, {"steps": 8_000}, needs=(rows,))
>>> records = run_stages([rows, fitted], folder)

The result of each stage is a small JSON file; its product, if it has one, is a directory that is
made when a stage needs it, and deleted as soon as no other one does.
"""

import json
import shutil
import time

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

__all__ = ["Records", "Stage", "run_stages"]

Records = dict[str, dict[str, dict[str, Any]]]
"""By case, then by kind: the "parameters" of a stage, its "result" and its "seconds"."""


@dataclass(frozen=True, slots=True)
class Stage:
    """One step of an experiment."""

    case: str
    """What it belongs to, such as the size of a table."""
    kind: str
    """What is done."""
    run: Callable[[], Any] = field(compare=False)
    """Do it, and return what is to be recorded: plain JSON."""
    parameters: dict[str, Any] = field(compare=False)
    """All that the result depends on; if they change, the stage runs again. Plain JSON."""
    expected: float = 1.0
    """Seconds it may take, for the estimate of what is left."""
    needs: "tuple[Stage, ...]" = ()
    """Stages whose products it reads; they come earlier."""
    product: Path | None = None
    """Directory that it makes for other stages."""

    @property
    def name(self) -> str:
        return f"{self.case} {self.kind}"


def run_stages(stages: Sequence[Stage], folder: Path) -> Records:
    """Run the stages that have no record in *folder* with their parameters.

    Parameters
    ----------
    stages : sequence of Stage
        In the order in which they run.
    folder : Path
        Directory of the records.

    Returns
    -------
    Records
        Of all *stages*.
    """
    folder.mkdir(parents=True, exist_ok=True)
    todo = _todo(stages, folder)
    console = Console(stderr=True)
    with _progress(console) as progress:
        line = progress.add_task("", total=None, left="")
        for done, stage in enumerate(todo):
            _delete_products(stages, todo[done:])
            left = _left(stages, todo[done:], folder)
            progress.reset(line, description=f"{done + 1} of {len(todo)}: {stage.name}", left=left)
            seconds = _run(stage, folder)
            left = _left(stages, todo[done + 1 :], folder)
            console.print(f"{stage.name}: {seconds:.1f} s; {left}", highlight=False)
    _delete_products(stages, [])
    records: Records = {}
    for stage in stages:
        records.setdefault(stage.case, {})[stage.kind] = json.loads(
            _file(stage, folder).read_text()
        )
    return records


def _todo(stages: Sequence[Stage], folder: Path) -> list[Stage]:
    """List the stages without a record, and those whose product they need but do not find."""
    todo: list[Stage] = []
    for stage in reversed(stages):
        needed = any(stage in later.needs for later in todo)
        gone = stage.product is not None and not stage.product.exists()
        if _recorded(stage, folder) is None or (needed and gone):
            todo.insert(0, stage)
    return todo


def _run(stage: Stage, folder: Path) -> float:
    """Run one stage and publish its record by one rename."""
    file = _file(stage, folder)
    # A product that is being made again must not be found beside the record of the old one.
    file.unlink(missing_ok=True)
    began = time.perf_counter()
    result = stage.run()
    seconds = time.perf_counter() - began
    record = {"parameters": stage.parameters, "seconds": seconds, "result": result}
    unfinished = file.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(record, indent=1))
    unfinished.replace(file)
    return seconds


def _recorded(stage: Stage, folder: Path) -> dict[str, Any] | None:
    """Read the record of a stage, if it was made with the same parameters."""
    file = _file(stage, folder)
    record = json.loads(file.read_text()) if file.exists() else {}
    return record if record.get("parameters") == stage.parameters else None


def _file(stage: Stage, folder: Path) -> Path:
    return folder / f"{stage.case}-{stage.kind}.json".replace(" ", "-").replace(",", "")


def _delete_products(stages: Iterable[Stage], todo: Sequence[Stage]) -> None:
    """Delete the products that no stage still to run needs or makes, finished or not."""
    for stage in stages:
        wanted = stage in todo or any(stage in later.needs for later in todo)
        if stage.product is not None and not wanted:
            unfinished = stage.product.parent.glob(f".{stage.product.name}*")
            for path in (stage.product, *unfinished):
                shutil.rmtree(path, ignore_errors=True)


def _left(stages: Sequence[Stage], todo: Sequence[Stage], folder: Path) -> str:
    """Estimate the time to go from how long the stages before took against expectation."""
    finished = [(s.expected, record["seconds"]) for s in stages if (record := _recorded(s, folder))]
    expected, taken = (sum(column) for column in zip((1.0, 1.0), *finished))
    minutes = taken / expected * sum(stage.expected for stage in todo) / 60
    return f"about {minutes:.0f} min to go" if minutes >= 1 else "less than a minute to go"


def _progress(console: Console) -> Progress:
    left = TextColumn("{task.fields[left]}")
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), left)
    return Progress(*columns, console=console, transient=True)
