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
"""The branch goes into PyMC as it is meant to, or says loudly why not."""

import ast
import os
import re

import pytest

from upstream.assemble import git, make_branch, missing, released
from upstream.commits import COMMITS, FACADE, FOLDERS, ROOT, place_files, trim_facade
from upstream.edits import AnchorError, Edit, edited

WORKFLOW = ".github/workflows/tests.yml"
EDITS = [edit for commit in COMMITS for edit in commit.edits]
STAND_INS = {
    WORKFLOW: "          - |\n            tests/logprob/test_utils.py\n\n      fail-fast: false\n",
    "tests/variational/__init__.py": "# PyMC's\n",
    **{
        path: "\n".join(f"# {edit.anchor}" for edit in EDITS if edit.path == path)
        for path in {edit.path for edit in EDITS}
    },
}
"""Files of PyMC, as far as edits look at them."""


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    for role in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{role}_NAME", "A. Nyone")
        monkeypatch.setenv(f"GIT_{role}_EMAIL", "any@example.org")
    for path, text in STAND_INS.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    git(tmp_path, "init", "--quiet", "--initial-branch=main")
    git(tmp_path, "add", "--force", ".")
    git(tmp_path, "commit", "--quiet", "--message=PyMC")
    return tmp_path


class TestEdits:
    @pytest.mark.parametrize("where, expected", [("after", "ab+c"), ("before", "a+bc")])
    def test_text_goes_where_the_anchor_is(self, where, expected):
        assert edited("abc", [Edit("f", "b", "+", where)]) == expected

    @pytest.mark.parametrize("text, times", [("ac", 0), ("abcb", 2)])
    def test_an_anchor_that_is_not_there_once_is_an_error(self, text, times):
        with pytest.raises(AnchorError, match=rf"f: the anchor 'b' occurs {times} times"):
            edited(text, [Edit("f", "b", "+")])

    def test_no_more_of_pymc_than_the_anchors_is_kept(self):
        for edit in EDITS:
            assert edit.anchor.count("\n") <= 3
            assert edit.anchor not in edit.text


class TestCommits:
    def test_every_file_is_brought_and_none_that_does_not_exist(self):
        placed = place_files()
        assert FACADE in placed
        for path in placed:
            assert any((folder / path).is_file() for folder in FOLDERS)

    def test_a_file_that_no_commit_brings_is_an_error(self):
        without_order = [commit for commit in COMMITS if "exchangeable" not in commit.message]
        with pytest.raises(ValueError, match=r"no commit brings \[.*order/check.py"):
            place_files(without_order)

    def test_a_module_that_imports_a_later_one_is_an_error(self):
        with pytest.raises(ValueError, match=r"imports \[.*\], which come with later commits"):
            place_files(COMMITS[::-1])

    def test_the_facade_names_what_is_there_and_nothing_else(self):
        placed, text = place_files(), (ROOT / FACADE).read_text()
        for number in range(placed[FACADE], len(COMMITS)):
            there = {path for path in placed if placed[path] <= number}
            tree = ast.parse(trim_facade(text, there))
            imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
            modules = {node.module.replace(".", "/") + ".py" for node in imports}
            names = {alias.name for node in imports for alias in node.names}
            (listed,) = (node.value for node in tree.body if isinstance(node, ast.Assign))
            assert modules <= there
            assert set(ast.literal_eval(listed)) == names - {"main"}
            used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
            assert ("main" in used) == ("main" in names)

    def test_the_facade_is_whole_in_the_end(self):
        text = (ROOT / FACADE).read_text()
        assert trim_facade(text, place_files()) == text


class TestBranch:
    def test_each_commit_brings_its_files_as_they_are(self, checkout):
        make_branch(checkout)
        assert missing(checkout) == []
        messages = git(checkout, "log", "--format=%s", "--reverse", "main..streaming")
        assert messages.splitlines() == [commit.message.splitlines()[0] for commit in COMMITS]
        assert git(checkout, "status", "--porcelain") == ""
        for path, number in place_files().items():
            source = next(folder / path for folder in FOLDERS if (folder / path).exists())
            assert (checkout / path).read_bytes() == source.read_bytes()
            state = f"streaming~{len(COMMITS) - 1 - number}"
            assert path in git(checkout, "show", "--format=", "--name-only", state).splitlines()

    def test_only_the_first_two_commits_change_code_of_pymc(self, checkout):
        make_branch(checkout)
        changed = ("log", "--diff-filter=M", "--format=", "--name-only")
        code = git(checkout, *changed, "main..streaming", "--", "pymc", f":!{FACADE}").split()
        assert code == ["pymc/pytensorf.py", "pymc/variational/inference.py"]
        assert (checkout / "tests/variational/__init__.py").read_text() == "# PyMC's\n"

    def test_every_test_file_is_in_the_list_of_a_job_once(self, checkout):
        make_branch(checkout)
        listed = (checkout / WORKFLOW).read_text().split()
        tests = [path for path in place_files() if re.search(r"/test_\w+\.py$", path)]
        assert len(tests) > 10
        assert [listed.count(path) for path in tests] == [1] * len(tests)

    def test_files_that_are_missing_are_reported(self, checkout):
        git(checkout, "rm", "--quiet", WORKFLOW)
        git(checkout, "commit", "--quiet", "--message=Remove it")
        make_branch(checkout)
        assert missing(checkout) == [WORKFLOW]

    def test_an_anchor_that_is_gone_leaves_the_checkout_as_it_was(self, checkout):
        (checkout / "pyproject.toml").write_text("")
        git(checkout, "commit", "--quiet", "--all", "--message=Rewrite")
        with pytest.raises(AnchorError, match=r"pyproject\.toml: the anchor .* occurs 0 times"):
            make_branch(checkout)
        assert git(checkout, "branch", "--format=%(refname:short)").split() == ["main"]
        assert git(checkout, "status", "--porcelain") == ""

    def test_changes_of_somebody_are_not_touched(self, checkout):
        (checkout / "mine.py").touch()
        with pytest.raises(ValueError, match="has changes; commit or stash them first"):
            make_branch(checkout)

    def test_a_pymc_that_has_streaming_is_refused(self, checkout):
        make_branch(checkout)
        with pytest.raises(OSError, match="a branch named 'streaming' already exists"):
            make_branch(checkout)
        with pytest.raises(ValueError, match=r"has .* already; start from the release"):
            make_branch(checkout, "again")

    def test_another_source_distribution_is_refused(self, tmp_path):
        (tmp_path / "pymc-6.4.0.tar.gz").touch()
        with pytest.raises(ValueError, match=r"has the SHA-256 \w+, not \w+; delete it"):
            released(tmp_path)
