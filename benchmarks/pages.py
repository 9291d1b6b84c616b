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
import sys
import tempfile

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.data import Data

__all__ = ["filled", "measure"]


def filled(text: str, name: str, command: str | None, table: str) -> str:
    """Put a table between its markers in the text of a page.

    Those of pages that PyMC gets name no command.
    """
    written = f": written by `{command}`" if command else ""
    before, rest = text.split(begin := f"<!-- {name}{written} -->\n")
    _, after = rest.split(end := f"<!-- end of {name} -->")
    return f"{before}{begin}{table}{end}{after}"


def measure(
    command: str,
    tables: Mapping[str, Callable[["Data", int], str]],
    arguments: Sequence[str] | None = None,
    *,
    rows: float,
    turns: int,
) -> None:
    """Run the command line of a program that measures.

    Parameters
    ----------
    command : str
        The program, as the markers of its tables name it.
    tables : mapping
        Functions by the name of the table that they return as Markdown, given the data and the
        number of repeats.
    arguments : sequence of str, optional
        Default: those of the process.
    rows, turns : float, int
        Defaults for the rows of a table and the repeats.
    """
    from benchmarks.data import Data

    parser = argparse.ArgumentParser(prog=command)
    parser.add_argument("--only", choices=tables, help="measure one table instead of all")
    parser.add_argument("--rows", type=float, default=rows, help="of the order book")
    parser.add_argument("--turns", type=int, default=turns)
    parser.add_argument("--folder", type=Path, help="for the data, which stay; default: temporary")
    parser.add_argument("--page", type=Path, help="file to put the tables into")
    chosen = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        data = Data(chosen.folder or Path(temporary), int(chosen.rows))
        for name in [chosen.only] if chosen.only else tables:
            text = tables[name](data, chosen.turns)
            sys.stdout.write(f"{name}\n{text}\n")
            if chosen.page is not None:
                chosen.page.write_text(filled(chosen.page.read_text(), name, command, text))
