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
"""The code of all pages and the examples of all docstrings run, and what pages name exists.

Some pages are run by the tests of what they are about; those are listed here.
"""

import ast
import doctest
import importlib.util
import json
import os
import re
import subprocess
import sys

from pathlib import Path
from typing import get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytensor
import pytest

from docs.pages import PAGES as FOLDER
from docs.pages import Ran, code_blocks, run, shown
from pymc.variational import streaming
from pymc.variational._streaming.fit.report import Verdict
from tests.variational.streaming.sources.libraries import HOW_TOS

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "docs" / "source"
WIDGET = "application/vnd.jupyter.widget-view+json"
NOTEBOOK = SOURCE / "notebooks" / "first_fit.ipynb"
UPSTREAM = sorted(FOLDER.glob("*.md"))
"""Pages that PyMC gets as they stand."""
PAGES = [*UPSTREAM, *sorted(SOURCE.glob("*.md"))]
PROSE = [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
CLAIMS = [*PAGES, ROOT / "README.md"]
"""Where each name of a program or test is that of one; CONTRIBUTING.md has examples of names."""
OF_THIS_REPOSITORY = re.compile(
    r"\bmake [a-z]+\b(?=`)|^make [a-z]|python -m (?!pymc\.)|\bbenchmarks\b|\btests/|\btest_\w+"
    r"|\bupstream\b|\bwheel\b|this repository|PyMC 6\.4 and|\.\./",
    re.MULTILINE,
)

RUN_HERE = {
    "averaging.md",
    "coming_from.md",
    "fit_check.md",
    "flights.md",
    "getting_started.md",
    "index.md",
    "order.md",
    "polish.md",
    "remedies.md",
}
RUN_ELSEWHERE = {
    "models.md": "tests/variational/streaming/test_models.py",
    "object_stores.md": "tests/variational/streaming/sources/test_object_stores.py",
    "preshuffle.md": "tests/variational/streaming/preshuffle/test_executors.py",
    "resume.md": "tests/variational/streaming/fit/test_resume.py",
    "sources.md": "tests/variational/streaming/sources/test_libraries.py",
}

SAME_STEP = ("scales off", "last-iterate noise", "not concave")
"""Verdicts whose next step is that of "not converged"."""

NUMBER = re.compile(r"-?\b\d[\d.,]*(e[+-]?\d+)?\b\.?")

# PyMC's compilation of predictions warns of what is none of a reader's business.
quietly = pytest.mark.filterwarnings("ignore:Numba will use object mode:UserWarning")


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def quick_compilation():
    """Run in Python what takes longer to compile than to run."""
    with pytensor.config.change_flags(mode="FAST_COMPILE"):
        yield


def polish_on_numba(*args, _polish=streaming.polish, **kwargs):
    """Polish as users do where all else runs in Python, since it alone makes thousands of calls."""
    with pytensor.config.change_flags(mode="NUMBA"):
        return _polish(*args, **kwargs)


def write_rows(folder: str, **columns) -> None:
    Path(folder).mkdir()
    pq.write_table(pa.table(columns), f"{folder}/rows.parquet")


def without_numbers(text: str) -> str:
    """Return what a text says beside its numbers, and how it is laid out."""
    return " ".join(NUMBER.sub("#", text).split())


class TestCode:
    def test_each_page_with_code_is_run(self):
        assert {page.name for page in PAGES if code_blocks(page)} == RUN_HERE | set(RUN_ELSEWHERE)
        for page, test in RUN_ELSEWHERE.items():
            assert page in (ROOT / test).read_text()

    def test_all_code_of_pages_that_are_run_in_parts_is_run(self):
        sections = (FOLDER / "sources.md").read_text().split("\n## ")[1:]
        with_code = {section.split("\n")[0] for section in sections if "```python" in section}
        assert with_code == {*HOW_TOS, "Strings, dates and types that change"}
        on_clusters = ["distributed" in block for block in code_blocks(FOLDER / "preshuffle.md")]
        assert sum(on_clusters) == 1  # a test of its own runs it

    @pytest.mark.slow
    @quietly
    @pytest.mark.usefixtures("quick_compilation")
    def test_getting_started_gives_what_it_shows(self, monkeypatch):
        monkeypatch.setattr(streaming, "polish", polish_on_numba)
        page = FOLDER / "getting_started.md"
        blocks = run_as_shown(page)
        assert sum(len(block.figures) for block in blocks) == 1
        names = blocks[-1].names
        off = (names["approx"].mean.eval()[:3] - names["exact"]) / names["approx"].std.eval()[:3]
        assert np.abs(off).max() < 0.1
        assert names["report"].verdict == "fine"

    @pytest.mark.usefixtures("quick_compilation")
    @pytest.mark.parametrize("name", ["averaging.md", "fit_check.md"])
    def test_a_how_to_comes_close_to_the_exact_posterior(self, name):
        *_, last = run_as_shown(FOLDER / name)
        rows, approx = last.names["rows"], last.names["approx"]
        assert np.abs(approx.mean.eval() - rows.mean()) < 0.5 * 2 / np.sqrt(len(rows))

    @pytest.mark.usefixtures("quick_compilation")
    def test_the_page_on_polishing_gives_what_it_shows(self, monkeypatch):
        monkeypatch.setattr(streaming, "polish", polish_on_numba)
        *_, last = run_shorter(FOLDER / "polish.md")
        assert last.names["report"].verdict == "fine"

    @pytest.mark.slow
    @quietly
    @pytest.mark.usefixtures("quick_compilation")
    def test_the_page_on_flights_gives_what_it_shows(self, monkeypatch):
        monkeypatch.setattr(streaming, "polish", polish_on_numba)
        *_, last = run_as_shown(FOLDER / "flights.md")
        assert last.names["report"].verdict == "fine"
        assert 0.88 < last.names["inside"].mean() < 0.92

    @quietly
    @pytest.mark.usefixtures("quick_compilation")
    def test_each_verdict_is_met_and_its_step_leads_out_of_it(self, monkeypatch):
        monkeypatch.setattr(streaming, "polish", polish_on_numba)
        page = FOLDER / "remedies.md"
        met = "\n".join(block.printed for block in run_as_shown(page)).splitlines()
        verdicts = set(get_args(Verdict))
        assert verdicts - set(met) <= set(SAME_STEP)
        for verdict in verdicts - {"fine"}:
            assert f'"{verdict}"'.lower() in page.read_text().lower()

    def test_the_order_of_the_page_is_seen(self):
        seen, repaired = run_as_shown(FOLDER / "order.md")
        assert seen.names["report"].ordered
        assert seen.figures
        assert repaired.printed.startswith("No order found")

    @pytest.mark.usefixtures("quick_compilation")
    def test_coming_from_elsewhere_is_coming_to_the_same(self):
        """Within what Adam's last step leaves, ten posterior standard deviations."""
        *_, last = run(FOLDER / "coming_from.md")
        fits = [last.names[name].mean.eval() for name in ("in_memory", "streamed")]
        np.testing.assert_allclose(fits, 0.5, atol=0.05)

    @pytest.mark.usefixtures("quick_compilation")
    def test_the_first_page_runs(self):
        x = np.random.default_rng(0).normal(size=20_000)
        write_rows("shuffled", x=x, y=0.5 * x)
        (block,) = run_shorter(FOLDER / "index.md")
        assert len(block.names["approx"].hist) == 500

    @pytest.mark.usefixtures("quick_compilation")
    @pytest.mark.parametrize("name", streaming.__all__)
    def test_examples_of_docstrings_run(self, name):
        flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
        runner = doctest.DocTestRunner(optionflags=flags)
        finder = doctest.DocTestFinder(exclude_empty=True)
        public = getattr(streaming, name)
        for example in finder.find(public, name, globs={name: public}):
            assert not any(doctest.SKIP in line.options for line in example.examples)
            runner.run(example)
        assert not runner.failures


def run_as_shown(page: Path) -> list[Ran]:
    """Run a page whose blocks must print what it shows for them, but for numbers."""
    blocks = list(run(page))
    for number, block in enumerate(blocks, 1):
        expected = without_numbers(shown(page, number) or "")
        assert without_numbers(block.printed) == expected, f"block {number}"
    return blocks


def run_shorter(page: Path) -> list[Ran]:
    """Run a page as shown, but with fewer steps than it asks for."""
    copy = Path(page.name)
    copy.write_text(re.sub(r"(?m)^ +20_000,$", "        500,", page.read_text()))
    return run_as_shown(copy)


PREPARE = """
import tests.test_docs
tests.test_docs.streaming.polish = tests.test_docs.polish_on_numba
"""

EXECUTE = """
import sys, nbclient, nbformat
notebook = nbformat.read(sys.argv[1], as_version=4)
nbclient.NotebookClient(notebook).execute()
nbformat.write(notebook, sys.argv[1])
"""


def test_the_notebook_shows_tables_a_figure_and_progress_but_no_raw_objects(tmp_path):
    """It is executed by a process of its own, in which no other test has left an event loop."""
    names = ("nbformat", "nbclient", "ipykernel", "ipywidgets")
    nbformat, *_ = map(pytest.importorskip, names)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    notebook.cells.insert(0, nbformat.v4.new_code_cell(PREPARE))
    nbformat.write(notebook, tmp_path / "copy.ipynb")
    flags = f"{os.environ.get('PYTENSOR_FLAGS', '')},cxx=,mode=FAST_COMPILE".lstrip(",")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTENSOR_FLAGS": flags}
    command = [sys.executable, "-c", EXECUTE, "copy.ipynb"]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True)
    notebook = nbformat.read(tmp_path / "copy.ipynb", as_version=4)
    outputs = [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]
    shown = [json.dumps(output) for cell in outputs for output in cell]
    assert not [text for text in shown if re.search(r"\(rows=|array\(|at 0x|Warning", text)]
    assert max(map(len, outputs)) <= 20  # a line of log for each of ten epochs
    kinds = {kind for cell in outputs for output in cell for kind in output.get("data", {})}
    assert kinds >= {"text/plain", "text/html", "image/png", WIDGET}


class TestUpstream:
    """PyMC gets docs/source/streaming as it stands, and has no other file of this repository."""

    @pytest.mark.parametrize("page", UPSTREAM, ids=lambda page: page.name)
    def test_a_page_names_nothing_that_only_this_repository_has(self, page):
        assert not OF_THIS_REPOSITORY.findall(page.read_text())

    @pytest.mark.parametrize("page", UPSTREAM, ids=lambda page: page.name)
    def test_a_page_links_to_pages_and_figures_of_its_folder_without_anchors(self, page):
        """PyMC's settings give headings no anchors."""
        for target in re.findall(r"\]\(([^)\s]*)\)", page.read_text()):
            assert target.startswith("https://") or (FOLDER / target).is_file(), target

    def test_every_page_is_in_the_table_of_contents_and_every_figure_on_a_page(self):
        contents = (FOLDER / "index.md").read_text().split("{toctree}")[1]
        named = re.findall(r"^(?:[^<:`\n]+<)?(\w+)>?$", contents, re.MULTILINE)
        assert sorted(named) == sorted(p.stem for p in FOLDER.glob("*.*") if p.stem != "index")
        text = "".join(page.read_text() for page in UPSTREAM)
        assert all(f"(figures/{figure.name})" in text for figure in FOLDER.glob("figures/*"))

    def test_headings_differ_between_pages(self):
        """PyMC's settings make a label of each."""
        headings = [h for p in UPSTREAM for h in re.findall(r"^#+ (.*)$", prose(p), re.MULTILINE)]
        assert len(set(headings)) == len(headings)


class TestCommands:
    @pytest.mark.parametrize("page", PROSE, ids=lambda page: page.name)
    def test_shell_blocks_parse(self, page):
        for block in code_blocks(page, "bash") + code_blocks(page, "console"):
            script = re.sub(r"^\$ ", "", block.replace("<your fork>", "fork"), flags=re.MULTILINE)
            subprocess.run(["bash", "-n"], input=script, text=True, check=True)

    @pytest.mark.parametrize("page", CLAIMS, ids=lambda page: page.name)
    def test_their_programs_targets_and_files_exist(self, page):
        text = page.read_text()
        targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
        for target in re.findall(r"(?:`|^)make ([a-z]+)\b", text, re.MULTILINE):
            assert target in targets
        for module, arguments in re.findall(r"python -m ([\w.]+)((?: [^\n`]*)?)", text):
            spec = importlib.util.find_spec(module)
            assert spec is not None, module
            for option in re.findall(r"--[a-z-]+", arguments) if "." in module else ():
                spellings = {option, option.replace("--no-", "--")}
                assert spellings & accepted(spec), f"{module} {option}"
        for path in re.findall(r"pytest (?:-\S+ )?(tests/[\w/.]+)", text):
            assert (ROOT / path).exists()

    @pytest.mark.parametrize("page", CLAIMS, ids=lambda page: page.name)
    def test_the_tests_that_it_names_exist(self, page):
        tests = "".join(path.read_text() for path in ROOT.glob("tests/**/*.py"))
        named = re.findall(r"\b(test_\w+|Test[A-Z]\w+)(\.py)?", page.read_text())
        for name, is_file in named:
            if is_file:
                assert list(ROOT.glob(f"tests/**/{name}.py")), name
            else:
                assert re.search(rf"(def|class) {name}\b", tests), name

    @pytest.mark.parametrize("page", PROSE, ids=lambda page: page.name)
    def test_its_links_lead_somewhere(self, page):
        for target, anchor in re.findall(r"\]\(([^)#\s]*)(#[\w-]+)?\)", page.read_text()):
            if target.startswith("http"):
                continue
            file = page.parent / target if target else page
            assert file.exists(), target
            if anchor:
                headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
                assert anchor[1:] in {slug(heading) for heading in headings}, anchor


def prose(page: Path) -> str:
    """Return a page without its code."""
    return re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)


def accepted(spec) -> set[str]:
    """Return the options in the code of a module, and in that which defines them for several.

    Programs that measure pass them as arguments to ``measure``; others call a function with them.
    """
    shared = Path(streaming.main.__code__.co_filename), ROOT / "benchmarks" / "harness.py"
    files = [Path(spec.origin), *shared]
    nodes = [n for file in files for n in ast.walk(ast.parse(file.read_text()))]
    literals = {n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    names = {n.arg for n in nodes if isinstance(n, ast.keyword | ast.arg) and n.arg}
    return literals | {f"--{name.replace('_', '-')}" for name in names}


def slug(heading: str) -> str:
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


class TestReference:
    def test_every_public_name_is_in_it(self):
        page = (FOLDER / "api.rst").read_text()
        documented = re.findall(
            r"^\.\. auto(?:class|function|exception):: (\w+)", page, re.MULTILINE
        )
        assert sorted(documented) == sorted(streaming.__all__)

    @pytest.mark.parametrize("name", streaming.__all__)
    def test_every_public_name_has_an_example_or_is_made_by_another(self, name):
        made = {"FitReport", "LogScore", "OrderReport", "PreshuffleReport", "Summary"}
        raised = {"OrderError", "OrderWarning", "StreamError", "StreamWarning"}
        assert (">>>" in getattr(streaming, name).__doc__) == (name not in made | raised)


class TestNumbers:
    @pytest.mark.parametrize(
        ["page", "names"],
        [("reliability.md", ["power", "alarms", "soak"]), ("streaming/order.md", ["orders"])],
    )
    def test_the_tables_of_reliability_are_those_of_the_results(self, page, names):
        from benchmarks import harness, reliability

        text = filled = (SOURCE / page).read_text()
        options = {"datasets": 0, "repeats": 0, "minutes": 0, "results": SOURCE / "results"}
        for name in names:
            table = reliability.TABLES[name](None, **options)
            filled = harness.filled(filled, name, reliability.COMMAND, table)
        assert filled == text

    def test_the_tables_of_the_zoo_are_those_of_the_results(self):
        from benchmarks import harness, zoo

        text = filled = (SOURCE / "zoo.md").read_text()
        found = harness.load(SOURCE / "results" / "zoo.json")
        for name, table in zoo.tables(found).items():
            filled = harness.filled(filled, name, zoo.COMMAND, table)
        assert filled == text


def test_the_figures_of_why_order_matters_show_what_it_says():
    """Ordered rows drift with the table, as shuffled ones do not; a whole buffer repairs them."""
    from docs import figures

    rng = np.random.default_rng(0)
    rows = figures.rows_in_time(figures.N_ROWS, rng)
    first, *_, last = figures.batches(rows)
    random = next(figures.batches(rng.permutation(rows)))
    assert figures.slope_of(first) > 0.7 > 0.6 > figures.slope_of(random) > 0.4
    assert figures.slope_of(last) < 0.3
    scattered, permuted = figures.preshuffled_by_hand(60, 4, rng)
    assert sorted(np.concatenate(permuted)) == list(range(60))
    assert all((np.diff(partition) > 0).all() for partition in scattered)
