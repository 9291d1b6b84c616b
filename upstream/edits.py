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

__all__ = [
    "DOCS",
    "HOOK",
    "PACKAGING",
    "RANDOM_STEPS",
    "AnchorError",
    "Edit",
    "edited",
    "list_tests",
]


class AnchorError(ValueError):
    """A file is not what an edit was written for."""


@dataclass(frozen=True, slots=True)
class Edit:
    """Text for one place of one file."""

    path: str
    anchor: str
    """Text that occurs exactly once in the file."""
    text: str
    where: Literal["after", "before"] = "after"


def edited(text: str, edits: Iterable[Edit]) -> str:
    """Return the *text* of a file after *edits* of it.

    Raises
    ------
    AnchorError
        If an anchor does not occur exactly once.
    """
    for edit in edits:
        if (found := text.count(edit.anchor)) != 1:
            raise AnchorError(
                f"{edit.path}: the anchor {edit.anchor!r} occurs {found} times, it must occur "
                "once; look at what changed in PyMC and adapt the edit"
            )
        start, end = text.split(edit.anchor)
        parts = [edit.anchor, edit.text] if edit.where == "after" else [edit.text, edit.anchor]
        text = "".join([start, *parts, end])
    return text


def list_tests(tests: Iterable[str]) -> list[Edit]:
    """Return the edit, if any, that puts test files into a job of PyMC's workflow.

    The first test file begins a new job, and the others follow it.
    """
    first = "tests/variational/test_stream_callbacks.py"
    lines = "".join(f"            {path}\n" for path in sorted(tests))
    new_job = first in lines
    anchor = "tests/logprob/test_utils.py" if new_job else first
    text = f"\n          - |\n{lines}" if new_job else lines
    return [Edit(".github/workflows/tests.yml", f"            {anchor}\n", text)] if lines else []


_INFERENCE = "pymc/variational/inference.py"

HOOK = (
    Edit(
        _INFERENCE,
        "from pymc.variational.operators import KL, KSD\n",
        "from pymc.variational.stream_callbacks import add_stream_callbacks\n",
    ),
    Edit(
        _INFERENCE,
        "        callbacks : list[function: (Approximation, losses, i) -> None]\n"
        "            calls provided functions after each iteration step\n",
        "            (and, last, those that shared variables of the model offer)\n",
    ),
    Edit(
        _INFERENCE,
        "            callbacks = []\n",
        "        callbacks = add_stream_callbacks(\n"
        '            callbacks, self.approx.model, kwargs.get("more_replacements")\n'
        "        )\n",
    ),
)

RANDOM_STEPS = (
    Edit(
        "pymc/pytensorf.py",
        "out.variable if isinstance(out, pytensor.Out) else out for out in makeiter(outputs)\n"
        "        ]",
        '\n        + list(kwargs.get("updates", {}).values())',
    ),
)

_LIBRARIES = (("- pytensor>=", "- pyarrow>=18.0\n"), ("- ipython>=", "- hypothesis>=6.110\n"))

PACKAGING = (
    Edit(
        "pyproject.toml",
        "\n\n[project.urls]\n",
        '\nstreaming = [\n    "pyarrow>=18.0",\n]',
        "before",
    ),
    Edit(
        "pyproject.toml",
        'addopts = ["--color=yes"]\n',
        "markers = [\"slow: takes more than about ten seconds; deselect with -m 'not slow'\"]\n",
    ),
    Edit(".gitignore", "*.pyc\n", "*.nbc\n*.nbi\n"),
    *(
        Edit(f"conda-envs/{system}environment-{use}.yml", anchor, text, "before")
        for system in ("", "windows-")
        for use in ("dev", "test")
        for anchor, text in _LIBRARIES
    ),
    # scripts/generate_pip_deps_from_conda.py writes the same lines.
    Edit("requirements-dev.txt", "ipython>=", "hypothesis>=6.110\n", "before"),
    Edit("requirements-dev.txt", "pymc-sphinx-theme", "pyarrow>=18.0\n", "before"),
)

DOCS = (
    Edit(
        "docs/source/api/vi.rst",
        "Operators\n---------\n",
        "Streaming\n---------\n\n.. toctree::\n   :maxdepth: 1\n\n   ../streaming/index\n\n",
        "before",
    ),
)
