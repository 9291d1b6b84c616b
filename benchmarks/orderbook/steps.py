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
"""Steps of a long experiment, which goes on where a run was stopped.

>>> steps = Steps(folder)
>>> with steps.product("1M", "rows", {"rows": 1_000_000}, write_rows) as rows:
...     steps.record("1M", "fit", {"steps": 8_000}, lambda: fit_rows(rows()))
>>> steps.records
"""

import json
import shutil
import time
import zlib

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

__all__ = ["Records", "Steps"]

Records = dict[str, dict[str, dict[str, Any]]]
"""By case, then by kind: the "parameters" of a step, its "result" and its "seconds"."""


class Steps:
    """The results of steps, each a small JSON file in *folder*."""

    def __init__(self, folder: Path) -> None:
        self.records: Records = {}
        self._folder = folder
        self._console = Console(stderr=True)
        for name in ("records", "tables"):
            (folder / name).mkdir(parents=True, exist_ok=True)

    def record(
        self, case: str, kind: str, parameters: dict[str, Any], run: Callable[[], Any]
    ) -> None:
        """Call *run* for a result that is plain JSON, unless that of these parameters is there."""
        file = self._folder / "records" / f"{_name(case, kind)}.json"
        record = json.loads(file.read_text()) if file.exists() else {}
        if record.get("parameters") != parameters:
            began = time.perf_counter()
            result = run()
            record = {"parameters": parameters, "seconds": time.perf_counter() - began}
            record["result"] = result
            unfinished = file.with_suffix(".unfinished")
            unfinished.write_text(json.dumps(record, indent=1))
            unfinished.replace(file)
            self._console.print(f"{case} {kind}: {record['seconds']:.1f} s", highlight=False)
        self.records.setdefault(case, {})[kind] = record

    @contextmanager
    def product(
        self, case: str, kind: str, parameters: dict[str, Any], make: Callable[[Path], Any]
    ) -> Iterator[Callable[[], Path]]:
        """Record a step that makes a directory, and yield what returns it for other steps.

        It is made again if a step needs it and it is gone, and deleted in the end.
        """
        number = zlib.crc32(json.dumps(parameters).encode())
        path = self._folder / "tables" / f"{_name(case, kind)}-{number:08x}"
        unfinished = path.with_name(f"{path.name}.unfinished")

        def make_whole() -> Any:
            for old in (path, unfinished):
                shutil.rmtree(old, ignore_errors=True)
            result = make(unfinished)
            unfinished.rename(path)
            return result

        def ready() -> Path:
            if not path.exists():
                make_whole()
            return path

        self.record(case, kind, parameters, make_whole)
        yield ready
        shutil.rmtree(path, ignore_errors=True)


def _name(case: str, kind: str) -> str:
    return f"{case}-{kind}".replace(" ", "-")
