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
"""The branch goes into PyMC as it is meant to, or says why not, and the pull request is true."""

import ast
import os
import re

import numpy as np
import pytest

from upstream.assemble import FOLDERS, ROOT, edited, git, imported, make_branch, place_files, read
from upstream.commits import COMMITS, FACADE, WORKFLOW, Edit

EDITS = [edit for commit in COMMITS for edit in commit.edits]
OWNED = "tests/variational/__init__.py"  # lies here, and PyMC has its own
REQUEST = (ROOT / "upstream" / "PULL_REQUEST.md").read_text()


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """Return a repository with files of PyMC, as far as edits look at them."""
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    for role in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{role}_NAME", "A. Nyone")
        monkeypatch.setenv(f"GIT_{role}_EMAIL", "any@example.org")
    files = dict.fromkeys((OWNED, *(edit.path for edit in EDITS)), "")
    for edit in EDITS:
        files[edit.path] += f"# {edit.anchor}\n"
    for path, text in files.items():
        (tmp_path / "theirs" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "theirs" / path).write_text(text)
    git(tmp_path, "init", "--quiet", "--initial-branch=main", "theirs")
    git(tmp_path / "theirs", "add", "--force", ".")
    git(tmp_path / "theirs", "commit", "--quiet", "--message=PyMC")
    return tmp_path / "theirs"


def test_text_goes_where_the_anchor_is_which_has_to_be_there_once():
    assert edited("abc", Edit("f", "b", "+")) == "ab+c"
    assert edited("abc", Edit("f", "b", "+", "before")) == "a+bc"
    for text, times in (("ac", 0), ("abcb", 2)):
        with pytest.raises(ValueError, match=f"the anchor 'b' occurs {times} times in f"):
            edited(text, Edit("f", "b", "+"))


def test_some_commit_brings_every_file():
    patterns = ("pymc/**/*.py", "tests/variational/**/*.py", "docs/source/streaming/**/*.*")
    found = {path: base for base in FOLDERS for glob in patterns for path in base.glob(glob)}
    ours = {str(path.relative_to(base)) for path, base in found.items()}
    assert place_files().keys() == ours - {OWNED}


def test_no_file_imports_one_of_a_later_commit_and_subpackages_stay_whole():
    placed = place_files()
    for path in placed.keys() - {FACADE}:
        if path.endswith(".py"):
            assert all(placed[need] <= placed[path] for need in imported(path, placed)), path
    del placed["pymc/variational/_streaming/fit/resume.py"]
    for name in ("sources", "batches", "order", "fit", "preshuffle"):
        folder = f"pymc/variational/_streaming/{name}/"
        assert len({placed[path] for path in placed if path.startswith(folder)}) == 1


def test_a_test_comes_with_what_the_page_that_it_runs_imports():
    needs = imported("tests/variational/streaming/test_models.py", place_files())
    assert "pymc/variational/_streaming/fit/predict.py" in needs


def test_each_commit_brings_its_files_as_they_are_and_lists_its_tests(checkout, tmp_path):
    tree = make_branch(checkout, tmp_path)
    messages = git(tree, "log", "--format=%s", "--reverse", "main..streaming")
    assert messages.splitlines() == [commit.message.splitlines()[0] for commit in COMMITS]
    assert git(tree, "status", "--porcelain") == ""
    placed = place_files()
    for path, number in placed.items():
        assert (tree / path).read_bytes() == read(path)
        state = f"streaming~{len(COMMITS) - 1 - number}"
        assert path in git(tree, "show", "--format=", "--name-only", state).splitlines()
    changed = git(tree, "diff", "--diff-filter=M", "--name-only", "main").split()
    assert set(changed) == {edit.path for edit in EDITS}
    listed = (tree / WORKFLOW).read_text().split()
    tests = [path for path in placed if "/test_" in path]
    assert len(tests) > 10
    assert [listed.count(path) for path in tests] == [1] * len(tests)


def test_the_facade_names_what_is_there_and_nothing_else(checkout, tmp_path):
    tree = make_branch(checkout, tmp_path)
    for number in range(place_files()[FACADE], len(COMMITS)):
        git(tree, "switch", "--quiet", "--detach", f"streaming~{len(COMMITS) - 1 - number}")
        module = ast.parse((tree / FACADE).read_text())
        imports = [node for node in module.body if isinstance(node, ast.ImportFrom)]
        assert all((tree / f"{node.module.replace('.', '/')}.py").exists() for node in imports)
        names = {alias.name for node in imports for alias in node.names}
        (listed,) = (node.value for node in module.body if isinstance(node, ast.Assign))
        assert set(ast.literal_eval(listed)) == names - {"main"}
        used = {node.id for node in ast.walk(module) if isinstance(node, ast.Name)}
        assert ("main" in used) == ("main" in names)


def test_a_checkout_that_lacks_a_file_or_has_streaming_is_refused(checkout, tmp_path):
    git(checkout, "rm", "--quiet", WORKFLOW)
    git(checkout, "commit", "--quiet", "--message=Remove it")
    with pytest.raises(FileNotFoundError, match=WORKFLOW):
        make_branch(checkout, tmp_path)
    (checkout / "pymc/variational/stream_callbacks.py").touch()
    git(checkout, "add", ".")
    git(checkout, "commit", "--quiet", "--message=Stream")
    with pytest.raises(FileExistsError, match=r"stream_callbacks\.py"):
        make_branch(checkout, tmp_path)


def rows_of(text: str) -> list[list[str]]:
    lines = (line.strip("|").split("|") for line in text.splitlines() if line.startswith("|"))
    return [[cell.strip() for cell in line] for line in lines]


def test_the_tables_of_the_request_have_the_numbers_of_the_pages():
    pages = [(ROOT / "docs/source" / name).read_text() for name in ("evidence.md", "speed.md")]
    there = [set(row) for page in pages for row in rows_of(page)]
    rows = rows_of(REQUEST)
    assert len(rows) > 10
    assert [row for row in rows if not any(set(row) <= cells for cells in there)] == []


def test_the_size_in_the_request_is_that_of_the_branch_within_a_tenth():
    stated = r"(\d+) commits with ([\d,]+) lines of code, ([\d,]+) of tests and ([\d,]+) of pages"
    n_commits, *sizes = re.search(stated, REQUEST).groups()
    lines = {path: read(path).count(b"\n") for path in place_files() if not path.endswith(".png")}
    actual = [
        sum(count for path, count in lines.items() if path.startswith(folder))
        for folder in ("pymc/", "tests/", "docs/")
    ]
    assert int(n_commits) == len(COMMITS)
    stated = [int(size.replace(",", "")) for size in sizes]
    np.testing.assert_allclose(stated, actual, rtol=0.1)
