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
"""Run the code of pages, and write what it prints and draws into them.

    python -m docs.pages getting_started.md

A page's code blocks are one script. What a block prints goes between the markers of its output,
and a figure that it draws to ``figures/<page>_<number>.png``, counted from 1.
"""

import argparse
import re
import tempfile
import textwrap

from collections.abc import Callable, Iterator
from contextlib import chdir
from dataclasses import dataclass
from pathlib import Path

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

__all__ = ["FIGURES", "PAGES", "Ran", "code_blocks", "run", "shown"]

PAGES = Path(__file__).parent / "source" / "streaming"
FIGURES = PAGES / "figures"
WIDTH = 84


@dataclass(frozen=True, slots=True)
class Ran:
    """A code block that was run."""

    printed: str
    figures: tuple[Figure, ...]
    names: dict
    """What the script has defined so far."""


def code_blocks(page: Path, language: str = "python") -> list[str]:
    """Return the code of a page in one language, block by block."""
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), flags=re.DOTALL)


def run(page: Path) -> Iterator[Ran]:
    """Run the Python code of a page in the working directory, block by block."""
    plt.switch_backend("agg")
    names: dict = {}
    for block in code_blocks(page):
        lines: list[str] = []
        names["print"] = _recorder(lines)
        exec(compile(block, page.name, "exec"), names)
        figures = tuple(plt.figure(number) for number in plt.get_fignums())
        yield Ran("\n".join(lines), figures, names)
        plt.close("all")


def shown(page: Path, number: int) -> str | None:
    """Return the output that a page shows for one of its blocks, if it shows any."""
    found = re.search(_output(number), page.read_text(), flags=re.DOTALL)
    return found and found[1]


def _output(number: int) -> str:
    """Return the pattern of what a page shows for one of its blocks."""
    return rf"<!-- output {number} -->\n```text\n(.*?)\n```\n<!-- end of output {number} -->"


def _recorder(lines: list[str]) -> Callable[..., None]:
    """Return a ``print`` that keeps its lines, without the progress bars of others."""

    def record(*values: object) -> None:
        lines.append(" ".join(map(str, values)))

    return record


def _fill(page: Path) -> None:
    text, drawn = page.read_text(), 0
    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        for number, block in enumerate(run(page), 1):
            if block.printed:
                (old,) = re.finditer(_output(number), text, flags=re.DOTALL)
                text = text[: old.start(1)] + _wrapped(block.printed) + text[old.end(1) :]
            for figure in block.figures:
                drawn += 1
                figure.savefig(FIGURES / f"{page.stem}_{drawn}.png", dpi=120, bbox_inches="tight")
    page.write_text(text)


def _wrapped(printed: str) -> str:
    """Wrap sentences, not the lines of tables."""
    return "\n".join(
        line if "  " in line.strip() else textwrap.fill(line, WIDTH, break_on_hyphens=False)
        for line in printed.splitlines()
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pages", nargs="+", help="names of pages in docs/source/streaming")
    for name in parser.parse_args().pages:
        _fill(PAGES / name)


if __name__ == "__main__":
    main()
