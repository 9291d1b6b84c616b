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
"""Put the numbers of the documentation into the text of the pull request.

python -m upstream.evidence
"""

import sys

from collections.abc import Mapping
from pathlib import Path

from benchmarks.pages import filled

__all__ = ["with_numbers"]

COMMAND = "python -m upstream.evidence"
DOCS = Path(__file__).parents[1] / "docs" / "source"
TEXT = Path(__file__).with_name("PULL_REQUEST.md")


def main() -> int:
    pages = {name: (DOCS / f"{name}.md").read_text() for name in ("evidence", "speed")}
    TEXT.write_text(with_numbers(TEXT.read_text(), pages))
    return 0


def with_numbers(text: str, pages: Mapping[str, str]) -> str:
    """Fill the tables of the pull request's text from pages, text by name."""
    drift = columns(
        table(pages["evidence"], "means"),
        ["rows", "in memory again", "in order of time", "preshuffled"],
    )
    memory = columns(table(pages["evidence"], "cost"), ["rows", "way", "peak memory"])
    memory = [row for row in memory if row[1] in ("way", "---", "in memory", "preshuffled")]
    speed = table(pages["speed"], "speed")
    for name, rows in (("drift", drift), ("memory", memory), ("speed", speed)):
        lines = "".join(f"| {' | '.join(row)} |\n" for row in rows)
        text = filled(text, name, COMMAND, lines)
    return text


def table(page: str, name: str) -> list[list[str]]:
    """Return the cells of a generated table, with the line below its head."""
    body = page.split(f"<!-- {name}: written by")[1].split(f"<!-- end of {name} -->")[0]
    lines = [line for line in body.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def columns(rows: list[list[str]], names: list[str]) -> list[list[str]]:
    places = [rows[0].index(name) for name in names]
    return [[row[place] for place in places] for row in rows]


if __name__ == "__main__":
    sys.exit(main())
