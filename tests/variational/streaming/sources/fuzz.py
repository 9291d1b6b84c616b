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
"""Parquet files of every kind, whole and damaged, and what a source makes of them.

Run a large number of files, and write down what became of them, with

    python -m tests.variational.streaming.sources.fuzz --files 20000 --output docs/source/results/fuzz.json

Files are read in child processes with bounded memory, so that a crash, a file that never ends
and an allocation without bounds are seen, and are laid to the file that caused them.
"""

import argparse
import io
import json
import os
import resource
import selectors
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings

from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pymc.variational.streaming import StreamError, parquet_source
from tests.variational.streaming.memory import forget_peak, peak_mb
from tests.variational.streaming.sources.fuzz_files import Case, damage, make_case, regions

__all__ = ["FAULTS", "main", "pyarrow_aborts", "run"]

ROOT = Path(__file__).parents[4]
FAULTS = ("crash", "hang", "undocumented error", "unnamed error", "short epoch", "false alarm")
"""What must never happen, damaged or not.

A process that ends over a damaged footer is no crash if pyarrow's own reading of the metadata
ends it, too: no `except` can catch that.
"""

_MEMORY = 1 << 30
"""Bytes that a child process may claim beyond what it has when it starts."""
_TIMEOUT = 120.0
"""Seconds that one file may take, and the start of a child process."""
_DOCUMENTED = StreamError, ValueError, TypeError, FileNotFoundError


def run(first: int, last: int, *, processes: int = 1) -> Iterator[dict]:
    """Yield what became of files *first* to *last*, in the order in which they are done."""
    edges = np.linspace(first, last, processes + 1).astype(int).tolist()
    children = [_Child(*span) for span in pairwise(edges)]
    with selectors.DefaultSelector() as selector:
        for child in children:
            child.start(selector)
        while selector.get_map():
            before = time.monotonic()
            for key, _ in selector.select(timeout=1.0):
                yield from key.data.take(selector)
            waited = min(time.monotonic() - before, 1.0)  # a machine that slept waited longer
            for child in children:
                child.check_time(waited)


class _Child:
    """A process that reads a span of files, and is started anew after the one that ended it."""

    def __init__(self, first: int, last: int):
        self.next = first
        self.last = last
        self.waited = 0.0
        """Seconds since the last line."""
        self.outcome = "crash"
        """What becomes of a file that ends the process."""

    def start(self, selector: selectors.BaseSelector) -> None:
        if self.next >= self.last:
            return
        command = [sys.executable, "-m", "tests.variational.streaming.sources.fuzz", "--child"]
        environment = {**os.environ, "ARROW_DEFAULT_MEMORY_POOL": "system"}
        self.process = subprocess.Popen(
            [*command, str(self.next), str(self.last)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self.waited = 0.0
        self.outcome = "crash"
        selector.register(self.process.stdout, selectors.EVENT_READ, self)

    def take(self, selector: selectors.BaseSelector) -> Iterator[dict]:
        self.waited = 0.0
        line = self.process.stdout.readline()
        if line:
            found = json.loads(line)
            self.next = found["number"] + 1
            yield found
        else:
            yield from self.end(selector)

    def check_time(self, waited: float) -> None:
        """End a process that is silent for too long; what it said before is still read."""
        self.waited += waited
        if self.waited > _TIMEOUT and self.next < self.last:
            self.outcome = "hang"
            self.process.kill()

    def end(self, selector: selectors.BaseSelector) -> Iterator[dict]:
        selector.unregister(self.process.stdout)
        self.process.stdout.close()
        code = self.process.wait()
        if self.next < self.last:
            case = make_case(self.next)
            outcome = self.outcome
            if outcome == "crash" and pyarrow_aborts(damage(case, self.next)):
                outcome = "abort of pyarrow.parquet.read_metadata"
            found = _describe(case, self.next)
            yield {**found, "outcome": outcome, "message": f"exit {code}"}
            self.next += 1
        self.start(selector)


def pyarrow_aborts(content: bytes) -> bool:
    """Whether pyarrow by itself ends the process when it is asked what a footer says."""
    code = (
        "import io, sys, pyarrow.parquet as pq\n"
        "pq.read_metadata(io.BytesIO(sys.stdin.buffer.read())).to_dict()"
    )
    done = subprocess.run([sys.executable, "-c", code], input=content, capture_output=True)
    return done.returncode == -signal.SIGABRT


def _read_files(first: int, last: int) -> None:
    """Read files in this process, and print a line about each."""
    _read_one_file()
    claimed = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGESIZE")
    resource.setrlimit(resource.RLIMIT_AS, (claimed + _MEMORY, claimed + _MEMORY))
    forget_peak()
    before = peak_mb()
    results, sys.stdout = sys.stdout, io.StringIO()  # progress bars write there, too
    with tempfile.TemporaryDirectory() as folder:
        for number in range(first, last):
            found = _judge(number, Path(folder, f"{number}.parquet"))
            found["peak_mb"] = round(peak_mb() - before)
            results.write(json.dumps(found) + "\n")
            results.flush()


def _read_one_file() -> None:
    """Load what reading takes, before memory is bounded and measured."""
    with tempfile.NamedTemporaryFile(suffix=".parquet") as file:
        pq.write_table(pa.table({"x": [1.0], "y": np.ones(1, "int8")}), file.name)
        list(parquet_source(file.name))


def _describe(case: Case, number: int) -> dict:
    return {"number": number, "damage": case.damage, "checksums": case.checksums}


def _judge(number: int, path: Path) -> dict:
    case = make_case(number)
    content = damage(case, number)
    found = _describe(case, number)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        outcome, message = _read(case, content, path)
    if caught and not case.damage:
        outcome, message = "false alarm", str(caught[0].message)
    if outcome == "wrong rows":
        outcome += f" after damage to {regions(case.content, content)}"
    path.unlink()
    return {**found, "outcome": outcome, "message": message}


def _read(case: Case, content: bytes, path: Path) -> tuple[str, str]:
    """Return what came of reading *content*, and the message if there is one."""
    path.write_bytes(case.content if case.late else content)
    try:
        source = parquet_source(path, columns=case.columns, invalid=case.invalid)
        if case.late:
            times = path.stat()
            path.write_bytes(content)
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        rows = np.concatenate(list(source))
    except Exception as err:
        return _judge_error(case, err, path)
    if len(rows) != source.n_rows:
        return "short epoch", f"{len(rows)} rows where {source.n_rows} were promised"
    return ("right rows" if case.expects(rows) else "wrong rows"), ""


def _judge_error(case: Case, err: Exception, path: Path) -> tuple[str, str]:
    message = f"{type(err).__name__}: {err}".replace(str(path), "FILE")
    if not isinstance(err, _DOCUMENTED):
        place = traceback.extract_tb(err.__traceback__)[-1]
        return "undocumented error", f"{message} at {place.filename}:{place.lineno}"
    if str(path) not in str(err):
        return "unnamed error", message
    if case.rows is not None and not case.damage:
        return "false alarm", message
    return "named error", message


def _table(found: list[dict]) -> dict:
    """Count outcomes by damage, apart for files with page checksums and without."""
    counts: dict[str, dict[str, Counter]] = {"with": {}, "without": {}}
    for one in found:
        part = counts["with" if one["checksums"] else "without"]
        part.setdefault(one["damage"] or "none", Counter())[one["outcome"]] += 1
    return {
        f"{name} page checksums": {kind: dict(sorted(c.items())) for kind, c in sorted(by.items())}
        for name, by in counts.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--files", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0, help="number of the first file")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--output", type=Path, help="JSON file for the counts")
    parser.add_argument("--child", type=int, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        _read_files(*options.child)
        return
    start = time.monotonic()
    span = options.first, options.first + options.files
    found = list(run(*span, processes=options.processes))
    report = {
        "command": "python -m "
        + " ".join(["tests.variational.streaming.sources.fuzz", *sys.argv[1:]]),
        "pyarrow": pa.__version__,
        "files": len(found),
        "outcomes": dict(Counter(one["outcome"] for one in found).most_common()),
        "largest growth of memory in MB": max(one.get("peak_mb", 0) for one in found),
        **_table(found),
    }
    text = json.dumps(report, indent=2) + "\n"
    sys.stdout.write(text)
    for one in found:
        if one["outcome"] not in ("right rows", "named error"):
            sys.stderr.write(json.dumps(one) + "\n")
    sys.stderr.write(f"{time.monotonic() - start:.0f} s\n")
    if options.output:
        options.output.write_text(text)


if __name__ == "__main__":
    main()
