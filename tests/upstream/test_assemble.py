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
"""The patch set goes into PyMC as it is meant to, or says loudly why not."""

import ast
import io
import os
import re
import subprocess
import tarfile

from pathlib import Path
from typing import ClassVar

import pytest

from upstream import assemble, commits
from upstream.assemble import assemble_tree, main, make_branch, verified
from upstream.commits import ADDED, COMMITS, LEFT_OUT, ROOT, changes, ours
from upstream.door import DOOR, ROOMS, names_from, rooms_imported_by
from upstream.edits import AnchorError, Edit, edited
from upstream.patches import PATCHES

STAND_INS = {
    "pymc/variational/__init__.py": '"""Variational Monte Carlo."""\n'
    '__all__ = (\n    "sgd",\n    "total_norm_constraint",\n)\n',
    "pymc/variational/inference.py": "import numpy as np\n\n"
    "from pymc.variational import test_functions\n"
    "from pymc.variational.approximations import Empirical, FullRank, MeanField\n\n\n"
    "class Inference:\n    def fit(self, callbacks=None):\n"
    "        callbacks : list[function: (Approximation, losses, i) -> None]\n"
    "            calls provided functions after each iteration step\n"
    "        if callbacks is None:\n            callbacks = []\n        return callbacks\n",
    "pyproject.toml": '[project.optional-dependencies]\nnutpie = ["nutpie"]\n\n[project.urls]\n'
    'a = "b"\n\n[tool.pytest.ini_options]\naddopts = ["--color=yes"]\n',
    "docs/source/api/vi.rst": "OPVI\n----\n\nOperators\n---------\n\n.. autosummary::\n\n   KL\n",
    ".github/workflows/tests.yml": "jobs:\n  ubuntu:\n    strategy:\n      matrix:\n"
    "        os: [ubuntu]\n        floatx: [float64]\n        test-subset:\n          - |\n"
    "            tests/test_util.py\n            tests/logprob/test_utils.py\n\n"
    "      fail-fast: false\n",
    **{
        f"conda-envs/{name}.yml": "dependencies:\n- pip\n- pytensor>=3.3.6,<3.4\n- scipy\n"
        "# Extra dependencies\n- ipython>=7.16\n"
        for name in (
            "environment-dev",
            "environment-test",
            "windows-environment-dev",
            "windows-environment-test",
        )
    },
    "tests/__init__.py": "# PyMC's\n",
    "tests/variational/__init__.py": "# PyMC's\n",
}
"""Files of PyMC, as far as edits look at them."""

MISSING_IN_SDIST = {path for path in STAND_INS if path.startswith(("docs", ".github", "conda"))}


def git(checkout, *arguments):
    command = ["git", "-C", str(checkout), "-c", "core.quotepath=off", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def write(root, files):
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    for role in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{role}_NAME", "A. Nyone")
        monkeypatch.setenv(f"GIT_{role}_EMAIL", "any@example.org")
    root = tmp_path / "pymc"
    write(root, STAND_INS)
    git(tmp_path, "init", "--quiet", "--initial-branch=main", str(root))
    git(root, "add", ".")
    git(root, "commit", "--quiet", "--message=PyMC")
    return root


@pytest.fixture
def sdist(tmp_path, monkeypatch):
    path = tmp_path / assemble.SDIST
    with tarfile.open(path, "w:gz") as archive:
        for name in STAND_INS.keys() - MISSING_IN_SDIST:
            if not name.startswith("tests"):
                info = tarfile.TarInfo(f"pymc-{assemble.VERSION}/{name}")
                info.size = len(STAND_INS[name])
                archive.addfile(info, io.BytesIO(STAND_INS[name].encode()))
    return path


class TestEdits:
    @pytest.mark.parametrize("where, expected", [("after", "ab+c"), ("before", "a+bc")])
    def test_text_goes_where_the_anchor_is(self, where, expected):
        assert edited([Edit("f", "b", "+", where)], {"f": "abc"}) == {"f": expected}

    @pytest.mark.parametrize("text, times", [("ac", 0), ("abcb", 2)])
    def test_an_anchor_that_is_not_there_once_is_an_error(self, text, times):
        with pytest.raises(AnchorError, match=rf"f: the anchor 'b' occurs {times} times"):
            edited([Edit("f", "b", "+")], {"f": text})

    def test_edits_of_one_file_add_up(self):
        edits = [Edit("f", "a", "1"), Edit("f", "1", "2"), Edit("absent", "a", "1")]
        assert edited(edits, {"f": "a", "g": "b"}) == {"f": "a12"}

    @pytest.mark.parametrize("edit", [e for c in COMMITS for e in c.edits], ids=lambda e: e.path)
    def test_each_edit_fails_without_its_anchor(self, edit):
        text = STAND_INS.get(edit.path) or (ROOT / edit.path).read_text()
        with pytest.raises(AnchorError, match=re.escape(edit.path)):
            edited([edit], {edit.path: text.replace(edit.anchor, "")})

    def test_no_more_of_pymc_than_the_anchors_is_kept(self):
        for edit in (e for c in COMMITS for e in c.edits):
            assert edit.anchor.count("\n") <= 3
            assert edit.anchor not in edit.text

    def test_pages_and_lists_are_edited(self):
        after = changes(COMMITS, STAND_INS)
        assert b"- pyarrow>=18.0\n- pytensor>=3.3.6" in after["conda-envs/environment-dev.yml"]
        assert b"\nStreaming\n---------\n" in after["docs/source/api/vi.rst"]
        assert (
            b'streaming = [\n    "pyarrow>=18.0",\n]\n\n[project.urls]' in after["pyproject.toml"]
        )

    def test_every_test_file_is_in_the_list_of_a_job_once(self):
        after = changes(COMMITS, STAND_INS)
        listed = after[".github/workflows/tests.yml"].decode().split()
        tests = [path for path in after if re.search(r"/test_\w+\.py$", path)]
        assert len(tests) > 20
        assert [listed.count(path) for path in tests] == [1] * len(tests)


class TestCommits:
    def test_a_commit_imports_nothing_that_is_to_come(self):
        for k in range(len(COMMITS)):
            files = ours(COMMITS[: k + 1])
            rooms = {Path(path).stem for path in files if path.startswith(ROOMS)}
            offered = names_from(files[DOOR].decode())
            for path in (p for p in files if p.endswith(".py")):
                text = files[path].decode()
                assert rooms_imported_by(text) <= rooms, path
                asked = re.findall(
                    r"from pymc\.variational\.streaming import ([A-Za-z]\w*)$", text, re.M
                )
                assert set(asked) <= offered, path

    def test_the_door_names_only_what_it_has(self):
        for k in range(len(COMMITS)):
            tree = ast.parse(ours(COMMITS[: k + 1])[DOOR])
            bound = {a.asname or a.name for n in tree.body if hasattr(n, "names") for a in n.names}
            bound |= {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
            assert names_from(ast.unparse(tree)) <= bound

    def test_the_last_commit_has_every_file_as_it_is(self):
        files = ours(COMMITS)
        for folder in (ROOT, ADDED):
            for path in folder.glob("pymc/variational/**/*.py"):
                assert files[str(path.relative_to(folder))] == path.read_bytes()
        there = {path.name for path in (ROOT / "tests/variational").glob("*.py")}
        assert there <= {Path(path).name for path in files}

    def test_a_module_that_no_commit_brings_is_noticed(self, monkeypatch):
        monkeypatch.setattr(commits, "COMMITS", COMMITS[:-1])
        with pytest.raises(ValueError, match=r"no commit is about \['hook'\] or needs it"):
            ours(COMMITS[:-1])

    def test_tests_find_the_pages_where_they_lie_in_pymc(self):
        files = ours(COMMITS)
        for path, content in files.items():
            for page in re.findall(r'"(docs/source/[\w/]+\.md)"', content.decode(errors="ignore")):
                if path.startswith("tests"):
                    assert page in files

    def test_pages_bring_the_numbers_that_they_link_and_no_others(self):
        numbers = {Path(path).name for path in ours(COMMITS) if path.endswith(".json")}
        assert numbers == {"fuzz.json", "reproduce.json"}


class TestTree:
    def test_the_tree_and_its_diff(self, sdist, tmp_path):
        left_out = assemble_tree(sdist, tmp_path)
        assert set(left_out) == MISSING_IN_SDIST
        tree = tmp_path / f"pymc-{assemble.VERSION}"
        assert (
            "with_streams(self.approx.model" in (tree / "pymc/variational/inference.py").read_text()
        )
        assert "register(self)" in (tree / DOOR).read_text()
        assert not (tree / "docs/source/api/vi.rst").exists()
        diff = (tmp_path / "streaming.diff").read_text()
        assert "+        callbacks = with_streams(self.approx.model, callbacks)\n" in diff
        assert "--- /dev/null\n+++ b/pymc/variational/streaming.py\n" in diff

    def test_a_second_run_gives_the_same_tree(self, sdist, tmp_path):
        assemble_tree(sdist, tmp_path)
        diff = (tmp_path / "streaming.diff").read_text()
        stale = tmp_path / f"pymc-{assemble.VERSION}" / "stale"
        stale.touch()
        assemble_tree(sdist, tmp_path)
        assert (tmp_path / "streaming.diff").read_text() == diff
        assert not stale.exists()

    def test_another_source_distribution_is_refused(self, sdist, capsys):
        with pytest.raises(ValueError, match=rf"has the SHA-256 \w+, not {assemble.SHA256}"):
            verified(sdist)
        assert main(["--output", str(sdist.parent)]) == 1
        assert "delete it" in capsys.readouterr().err
        assert not (sdist.parent / f"pymc-{assemble.VERSION}").exists()

    def test_what_is_left_out_is_said(self, sdist, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(assemble, "verified", lambda path: path)
        assert main(["--output", str(tmp_path)]) == 0
        out = capsys.readouterr().out
        assert "left out: edits of docs/source/api/vi.rst, which is not there" in out
        assert all(f"not laid in: {paths} ({why})" in out for paths, why in LEFT_OUT.items())


class TestBranch:
    def test_one_commit_for_each_step_of_the_review(self, checkout):
        assert make_branch(checkout, "streaming") == []
        messages = git(checkout, "log", "--format=%s", "--reverse", "main..streaming")
        assert messages.splitlines() == [commit.message for commit in COMMITS]
        assert git(checkout, "status", "--porcelain") == ""
        last = changes(COMMITS, STAND_INS)
        for path in last.keys() - {commits.PACKAGE}:
            assert (checkout / path).read_bytes() == last[path]

    def test_each_commit_adds_only_what_it_is_about(self, checkout):
        make_branch(checkout, "streaming")
        for k, commit in enumerate(COMMITS):
            new = git(checkout, "show", "--format=", "--name-only", f"streaming~{6 - k}").split()
            assert all(f"{ROOMS}/{name}.py" in new for name in commit.about)
            assert ("pymc/variational/inference.py" in new) == (commit is COMMITS[-1])

    def test_pymcs_own_package_files_are_kept(self, checkout):
        make_branch(checkout, "streaming")
        assert (checkout / "tests/variational/__init__.py").read_text() == "# PyMC's\n"

    def test_a_second_run_is_refused(self, checkout):
        make_branch(checkout, "streaming")
        git(checkout, "switch", "--quiet", "main")
        with pytest.raises(ValueError, match="has a branch 'streaming'; delete it"):
            make_branch(checkout, "streaming")
        git(checkout, "switch", "--quiet", "streaming")
        with pytest.raises(ValueError, match=r"PyMC in .* has .* already; start from the release"):
            make_branch(checkout, "again")

    def test_changes_of_somebody_are_not_touched(self, checkout):
        (checkout / "mine.py").touch()
        with pytest.raises(ValueError, match="has changes; commit or stash them first"):
            make_branch(checkout, "streaming")

    def test_an_anchor_that_is_gone_leaves_the_checkout_as_it_was(self, checkout):
        (checkout / "pymc/variational/inference.py").write_text("")
        git(checkout, "commit", "--quiet", "--all", "--message=Rewrite")
        with pytest.raises(AnchorError, match=r"inference\.py: the anchor .* occurs 0 times"):
            make_branch(checkout, "streaming")
        assert git(checkout, "branch", "--format=%(refname:short)").split() == ["main"]
        assert git(checkout, "status", "--porcelain") == ""

    def test_a_folder_without_git_is_an_error(self, tmp_path):
        with pytest.raises(OSError, match="not a git repository"):
            make_branch(tmp_path, "streaming")

    def test_files_that_are_missing_are_reported(self, checkout):
        git(checkout, "rm", "--quiet", "docs/source/api/vi.rst")
        git(checkout, "commit", "--quiet", "--message=Remove a page")
        assert make_branch(checkout, "streaming") == ["docs/source/api/vi.rst"]


class TestPatches:
    FILES: ClassVar = STAND_INS | {
        "pymc/pytensorf.py": "outputs=[\n            out.variable if isinstance(out, pytensor.Out) "
        "else out for out in makeiter(outputs)\n        ],\n"
    }

    @pytest.mark.parametrize("name", PATCHES)
    def test_each_is_one_more_commit_with_its_tests(self, checkout, name):
        write(checkout, self.FILES)
        git(checkout, "add", ".")
        git(checkout, "commit", "--quiet", "--allow-empty", "--message=More of PyMC")
        make_branch(checkout, "streaming", [*COMMITS, PATCHES[name]])
        assert git(checkout, "log", "-1", "--format=%B").strip() == PATCHES[name].message
        changed = git(checkout, "show", "--format=", "--name-only").split()
        expected = {edit.path for edit in PATCHES[name].edits} | set(PATCHES[name].files)
        assert set(changed) == expected | {".github/workflows/tests.yml"}

    @pytest.mark.parametrize("name", PATCHES)
    def test_merging_needs_none(self, name):
        without = changes(COMMITS, self.FILES)
        assert not without.keys() & set(PATCHES[name].files)
        assert all(edit.path not in without for edit in PATCHES[name].edits)
