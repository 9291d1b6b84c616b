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
"""Small edits to PyMC's own files, each at a place that an anchor names.

They hold none of PyMC's text but the anchors.  An anchor that is gone, or that is there twice, is
an error: PyMC has changed, and somebody has to look.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

__all__ = ["DOCS", "HOOK", "PACKAGING", "AnchorError", "Edit", "edited", "list_tests"]


class AnchorError(ValueError):
    """A file is not what an edit was written for."""


@dataclass(frozen=True, slots=True)
class Edit:
    """Text for one place of one file."""

    path: str
    anchor: str
    """What occurs exactly once in the file."""
    text: str
    where: Literal["after", "before"] = "after"


def edited(edits: Iterable[Edit], files: dict[str, str]) -> dict[str, str]:
    """Return the *files*, text by path, that edits change, as they are afterwards.

    Raises
    ------
    AnchorError
        If an anchor does not occur exactly once.
    """
    changed: dict[str, str] = {}
    for edit in edits:
        if edit.path in files:
            changed[edit.path] = _apply(edit, changed.get(edit.path, files[edit.path]))
    return changed


def list_tests(tests: Iterable[str]) -> Edit:
    """Return the edit that gives test files a job of their own.

    ``scripts/check_all_tests_are_covered.py`` wants each in the list of a job, once.
    """
    lines = "".join(f"            {path}\n" for path in sorted(tests))
    return Edit(
        ".github/workflows/tests.yml",
        "            tests/logprob/test_utils.py\n",
        f"\n          - |\n{lines}",
    )


def _apply(edit: Edit, text: str) -> str:
    found = text.count(edit.anchor)
    if found != 1:
        raise AnchorError(
            f"{edit.path}: the anchor {edit.anchor!r} occurs {found} times, it must occur once; "
            "look at what changed in PyMC and adapt the edit"
        )
    parts = [edit.anchor, edit.text]
    return text.replace(edit.anchor, "".join(parts if edit.where == "after" else parts[::-1]))


_DATASET = "pymc/variational/streaming.py"
_INFERENCE = "pymc/variational/inference.py"
_PACKAGE = "pymc/variational/__init__.py"

HOOK = [
    Edit(
        _DATASET,
        "from pymc.variational._streaming.order import",
        "from pymc.variational._streaming.hook import register\n",
        "before",
    ),
    Edit(
        _DATASET,
        "        self._buffer = pytensor.shared(self._blank(), name=name)\n",
        "        register(self)\n",
    ),
    Edit(_DATASET, "        self.__dict__.update(state)\n", "        register(self)\n"),
    Edit(
        _INFERENCE,
        "from pymc.variational.approximations import Empirical, FullRank, MeanField\n",
        "from pymc.variational._streaming.hook import with_streams\n",
        "before",
    ),
    Edit(
        _INFERENCE,
        "        callbacks : list[function: (Approximation, losses, i) -> None]\n"
        "            calls provided functions after each iteration step\n",
        "            (and, last, those of the streams that the model depends on)\n",
    ),
    Edit(
        _INFERENCE,
        "            callbacks = []\n",
        "        callbacks = with_streams(self.approx.model, callbacks)\n",
    ),
    Edit(  # so that the test starts without a callback
        "tests/variational/test_processes.py",
        '        inference.fit(0, progressbar=False, compile_kwargs={"mode": "FAST_COMPILE"})\n',
        "        inference.state = inference.state._replace(callbacks=[])\n",
    ),
    Edit(_PACKAGE, '"""Variational Monte Carlo."""\n', "\nimport importlib\n"),
    Edit(
        _PACKAGE,
        '    "total_norm_constraint",\n)\n',
        """

def __getattr__(name: str):
    # On first use: it loads scipy.stats, which `import pymc` must not
    if name == "streaming":
        return importlib.import_module("pymc.variational.streaming")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
""",
    ),
]

DOCS = [
    Edit(
        "docs/source/api/vi.rst",
        "Operators\n---------\n",
        "Streaming\n---------\n\n.. toctree::\n   :maxdepth: 1\n\n   ../streaming/index\n\n",
        "before",
    ),
]

PACKAGING = [
    Edit(
        "pyproject.toml",
        "\n\n[project.urls]\n",
        '\nstreaming = [\n    "pyarrow>=18.0",\n]',
        "before",
    ),
    *(
        Edit(f"conda-envs/{name}.yml", anchor, text, "before")
        for name in (
            "environment-dev",
            "environment-test",
            "windows-environment-dev",
            "windows-environment-test",
        )
        for anchor, text in (
            ("- pytensor>=", "- pyarrow>=18.0\n"),
            ("- ipython>=", "- hypothesis>=6.110\n"),
        )
    ),
    Edit(
        "pyproject.toml",
        'addopts = ["--color=yes"]\n',
        "markers = [\"slow: takes more than about ten seconds; deselect with -m 'not slow'\"]\n",
    ),
]
