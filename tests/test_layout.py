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
"""The modules lie in the order in which the data meet them, and stay small enough to review."""

import ast
import dataclasses
import sys
import threading

from collections.abc import Iterator
from contextlib import contextmanager
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pymc.variational import streaming
from pymc.variational.streaming import StreamingDataset, parquet_source, shuffle_buffer

VARIATIONAL = Path(streaming.__file__).parent
PACKAGE = "pymc.variational._streaming"
FACADE = "pymc.variational.streaming"
ORDER = (
    "errors utils sources batches likelihood contract guards order reader callback dataset fit "
    "preshuffle"
).split()
"""What lies in the package; a part imports itself and earlier ones."""
OF_PRESHUFFLE = {"errors", "utils", "sources", "preshuffle"}
"""The shuffle on disk knows nothing of streams and models."""
MOST_LINES = 450
MOST_LINES_OF_FACADE = 99
MOST_MODULES_OF_A_ROW = 6


def module_name(file: Path) -> str:
    parts = file.relative_to(VARIATIONAL).with_suffix("").parts
    return ".".join(("pymc", "variational", *parts)).removesuffix(".__init__")


FILES = {module_name(file): file for file in VARIATIONAL.glob("_streaming/**/*.py")}
FILES[FACADE] = VARIATIONAL / "streaming.py"
SOURCES = {name: file.read_text() for name, file in FILES.items()}


def imports(sources: dict[str, str]) -> dict[str, set[str]]:
    """Return the modules of *sources* that each of them imports, also in functions."""
    return {name: set(imported(text, sources)) - {name} for name, text in sources.items()}


def imported(text: str, sources: dict[str, str]) -> Iterator[str]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            # What is imported from a package may be a module or a name.
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in sources else node.module or "" for name in names]
        else:
            continue
        yield from (name for name in names if name in sources)


def part(name: str) -> str:
    """Return the module or subpackage directly below the package that a module is in."""
    return name.removeprefix(f"{PACKAGE}.").split(".")[0]


def broken_rules(sources: dict[str, str]) -> list[str]:
    """Say which imports run against the order of the parts, and which make a circle."""
    graph = imports(sources)
    edges = [(a, b) for a, found in graph.items() for b in found if a not in (FACADE, PACKAGE)]
    broken = [f"{a} imports the façade" for a, b in edges if b == FACADE]
    inner = [(a, b) for a, b in edges if b not in (FACADE, PACKAGE)]
    for a, b in inner:
        if ORDER.index(part(b)) > ORDER.index(part(a)):
            broken.append(f"{a} imports {b}, which comes later")
        elif part(a) == "preshuffle" and part(b) not in OF_PRESHUFFLE:
            broken.append(f"{a} imports {b}, which is not for preshuffle")
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as err:
        broken.append(f"a circle: {' <- '.join(err.args[1])}")
    return broken


class TestModules:
    @pytest.mark.parametrize("name", sorted(SOURCES))
    def test_each_is_short_enough_to_be_read_at_once(self, name):
        most = MOST_LINES_OF_FACADE if name == FACADE else MOST_LINES
        assert len(SOURCES[name].splitlines()) <= most

    def test_those_of_tests_are_short_too(self):
        files = Path(__file__).parent.glob("**/*.py")
        lengths = {file.name: len(file.read_text().splitlines()) for file in files}
        assert {name: n for name, n in lengths.items() if n > MOST_LINES} == {}

    def test_all_lie_in_a_part_that_has_its_position_in_the_order(self):
        found = {part(name) for name in SOURCES if name not in (FACADE, PACKAGE)}
        assert found <= set(ORDER)
        assert found >= {"sources", "batches", "order", "fit", "preshuffle"}

    def test_imports_run_from_later_parts_to_earlier_ones_without_a_circle(self):
        assert broken_rules(SOURCES) == []


@pytest.mark.parametrize("prefetch", [False, True])
def test_a_row_passes_few_modules_between_its_file_and_the_buffer(tmp_path, prefetch):
    """The dataset, which owns the buffer, does not count."""
    n_rows, window, batch = 20_000, 1_000, 100
    rows = np.random.default_rng(0).normal(size=(2, n_rows))
    pq.write_table(pa.table({"x": rows[0], "y": rows[1]}), tmp_path / "rows.parquet")
    blocks = shuffle_buffer(parquet_source(tmp_path), buffer_size=window, batch_size=batch, seed=0)
    with StreamingDataset(blocks, batch_size=batch, prefetch=prefetch) as ds:
        ds.advance()  # a sample of the rows is compared before the first batch
        with modules_that_rows_pass() as modules:
            while ds.epoch < 2:
                ds.advance()
    modules -= {f"{PACKAGE}.dataset"}
    assert modules >= {f"{PACKAGE}.{name}" for name in ("batches.window", "reader")}
    assert any(name.startswith(f"{PACKAGE}.sources.parquet.") for name in modules)
    assert len(modules) <= MOST_MODULES_OF_A_ROW, sorted(modules)


@contextmanager
def modules_that_rows_pass() -> Iterator[set[str]]:
    """Collect the modules whose functions return or yield rows, and those that wait for them.

    Functions of the order check return numbers about rows that they were shown, which are left
    out: of these modules only one that waits while a source reads stands in the way of rows.
    """
    modules: set[str] = set()
    names = {str(file): name for name, file in FILES.items()}

    def profile(frame, event, arg):
        name = names.get(frame.f_code.co_filename)
        if event != "return" or name is None or not holds_rows(arg):
            return
        if part(name) != "order":
            modules.add(name)
        while part(name) == "sources" and frame is not None:
            modules.add(names.get(frame.f_code.co_filename, name))
            frame = frame.f_back

    threading.setprofile_all_threads(profile)
    sys.setprofile(profile)
    try:
        yield modules
    finally:
        sys.setprofile(None)
        threading.setprofile_all_threads(None)


def holds_rows(value: object) -> bool:
    """Tell whether a value is rows, or a tuple or dataclass with rows in it."""
    if dataclasses.is_dataclass(value):
        value = tuple(getattr(value, field.name) for field in dataclasses.fields(value))
    if isinstance(value, tuple):
        return any(map(holds_rows, value))
    return isinstance(value, np.ndarray | pa.RecordBatch | pa.Table) and len(value.shape) == 2
