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
"""The command line: ``python -m pymc.variational.streaming preshuffle SRC DST --seed 0``."""

import argparse
import sys

from collections.abc import Sequence

from pymc.variational._streaming.errors import StreamError
from pymc.variational._streaming.preshuffle.command import preshuffle

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command, and return the exit status: 0, 1 after an error message, or 130."""
    options = vars(_parser().parse_args(argv))
    source = options.pop("source")
    try:
        report = preshuffle(source if source[1:] else source[0], **options)
    except (StreamError, OSError, ValueError, ImportError) as err:
        message = str(err).replace("overwrite=True", "overwrite=True (--overwrite)")
        sys.stderr.write(f"error: {message}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; nothing unfinished was published\n")
        return 130
    sys.stdout.write(f"{report}\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m pymc.variational.streaming")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser(
        "preshuffle", help="write the rows of Parquet files in uniformly random order"
    )
    add = command.add_argument
    add("source", nargs="+", metavar="SRC", help="file, directory, glob or URI")
    add("destination", metavar="DST", help="directory or URI for the result")
    add("--seed", type=int, required=True, help="seed of the permutation")
    add(
        "--columns",
        type=lambda text: text.split(","),
        metavar="A,B",
        help="columns to keep; default: all",
    )
    add("--memory-limit", default="512MB", metavar="SIZE", help="default: %(default)s")
    add("--scratch", metavar="DIR", help="for rows between the passes; default: beside DST")
    add("--format", default="parquet", choices=["parquet", "arrow"], help="default: %(default)s")
    add("--compression", metavar="CODEC", help="default: lz4 for Parquet, none for Arrow")
    add(
        "--split",
        type=split,
        metavar="A=0.9,B=0.1",
        help="folders below DST, and the fraction of the rows that each gets",
    )
    add("--overwrite", action="store_true", help="replace what is at DST")
    add("--quiet", dest="progressbar", action="store_false", help="show no progress bar")
    return parser


def split(text: str) -> dict[str, float]:
    """Read a split; argparse names this function where it cannot."""
    pairs = (part.partition("=") for part in text.split(","))
    return {name: float(fraction) for name, _, fraction in pairs}
