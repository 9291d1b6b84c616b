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
"""Tables that programs measure, print, and write into pages.

>>> measure("python -m benchmarks.fit_speed", {"speed": speed_table}, rows=20e6, turns=9)
"""

import argparse
import json
import os
import platform
import sys
import tempfile

from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import tests  # noqa: F401  # puts the checkout before an installed wheel

__all__ = ["about", "filled", "load", "markdown", "measure", "save"]


def filled(text: str, name: str, command: str | None, table: str) -> str:
    """Put a table between its markers in the text of a page.

    Those of pages that PyMC gets name no command.
    """
    bare = f"<!-- {name} -->\n"
    begin = bare if bare in text else f"<!-- {name}: written by `{command}` -->\n"
    before, rest = text.split(begin)
    _, after = rest.split(end := f"<!-- end of {name} -->")
    return f"{before}{begin}{table}{end}{after}"


def markdown(heads: str, lines: Iterable[Iterable[object]]) -> str:
    """Return a table, given its heads with bars between them, and the cells of its lines."""
    rule = "|---" * (1 + heads.count("|")) + "|\n"
    return f"| {heads} |\n{rule}" + "".join(f"| {' | '.join(map(str, x))} |\n" for x in lines)


def load(results: Path) -> dict[str, Any]:
    """Return what was measured before, if anything."""
    return json.loads(results.read_text()) if results.exists() else {}


def save(found: Mapping[str, Any], results: Path) -> None:
    """Replace a file of results, a line for each."""
    lines = (f"{json.dumps(key)}: {json.dumps(value)}" for key, value in found.items())
    part = results.with_suffix(".part")
    part.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    part.replace(results)


def about(*packages: str) -> dict[str, Any]:
    """Return the machine, and the versions of packages that are installed."""
    versions = {name: version(name) for name in packages if find_spec(name)}
    return {"machine": platform.platform(), "processors": os.cpu_count(), "versions": versions}


def measure(
    command: str,
    tables: Mapping[str, Callable[..., str]],
    arguments: Sequence[str] | None = None,
    *,
    rows: float,
    **options: Any,
) -> str:
    """Run the command line of a program that measures, and return the last of its tables.

    Parameters
    ----------
    command : str
        The program, as the markers of its tables name it.
    tables : mapping
        Functions by the name of the table that they return as Markdown, given the data and the
        options.
    arguments : sequence of str, optional
        Default: those of the process.
    rows : float
        Default for the rows of a table.
    **options
        Other options of the program, and their defaults; with zero for what it takes a number of,
        a program that keeps its results shows those that it has.
    """
    from benchmarks.data import Data

    parser = argparse.ArgumentParser(prog=command)
    parser.add_argument("--only", nargs="+", choices=tables, default=list(tables))
    parser.add_argument("--rows", type=float, default=rows, help="of a table")
    parser.add_argument("--folder", type=Path, help="for the data, which stay; default: temporary")
    parser.add_argument("--page", type=Path, help="file to put the tables into")
    for option, default in options.items():
        parser.add_argument(f"--{option}", type=type(default), default=default)
    chosen = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        data = Data(chosen.folder or Path(temporary), int(chosen.rows))
        for name in chosen.only:
            text = tables[name](data, **{option: getattr(chosen, option) for option in options})
            sys.stdout.write(f"{name}\n{text}\n")
            if chosen.page is not None:
                chosen.page.write_text(filled(chosen.page.read_text(), name, command, text))
    return text
