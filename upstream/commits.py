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
"""The commits of the branch, in the order of the review.

A commit brings whole files, which lie here where they will lie in PyMC, and makes small edits of
PyMC's own files.  These are described by anchors, so that no more of PyMC's text is kept here.
"""

from dataclasses import dataclass
from typing import Literal

__all__ = ["COMMITS", "FACADE", "FIRST_TEST", "WORKFLOW", "Edit"]

FACADE = "pymc/variational/streaming.py"
MODULES = "pymc/variational/_streaming"
TESTS = "tests/variational/streaming"
PAGES = "docs/source/streaming"
INFERENCE = "pymc/variational/inference.py"
WORKFLOW = ".github/workflows/tests.yml"
FIRST_TEST = "            tests/variational/test_stream_callbacks.py\n"
"""First line of the job of PyMC's workflow that runs the tests of the branch."""


@dataclass(frozen=True, slots=True)
class Edit:
    """Text for one place of one file."""

    path: str
    anchor: str
    """Text that occurs exactly once in the file."""
    text: str
    where: Literal["after", "before"] = "after"


@dataclass(frozen=True, slots=True)
class Commit:
    """One step of the review."""

    message: str
    files: tuple[str, ...]
    """Patterns of paths; the longest pattern that fits a file decides which commit brings it."""
    edits: tuple[Edit, ...] = ()


def _subpackage(name: str, *pages: str) -> tuple[str, ...]:
    code = (f"{MODULES}/{name}/**/*.py", f"{TESTS}/{name}/**/*.py")
    return code + tuple(f"{PAGES}/{page}.md" for page in pages)


HOOK = (
    Edit(
        INFERENCE,
        "from pymc.variational.operators import KL, KSD\n",
        "from pymc.variational.stream_callbacks import add_stream_callbacks\n",
    ),
    Edit(
        INFERENCE,
        "        callbacks : list[function: (Approximation, losses, i) -> None]\n"
        "            calls provided functions after each iteration step\n",
        "            (and, last, those that shared variables of the model offer)\n",
    ),
    Edit(
        INFERENCE,
        "            callbacks = []\n",
        "        callbacks = add_stream_callbacks(\n"
        '            callbacks, self.approx.model, kwargs.get("more_replacements")\n'
        "        )\n",
    ),
    Edit(WORKFLOW, "            tests/logprob/test_utils.py\n", f"\n          - |\n{FIRST_TEST}"),
)
RANDOM_STEPS = (
    Edit(
        "pymc/pytensorf.py",
        "out.variable if isinstance(out, pytensor.Out) else out for out in makeiter(outputs)\n"
        "        ]",
        '\n        + list(kwargs.get("updates", {}).values())',
    ),
)
PYARROW, HYPOTHESIS = "- pyarrow>=18.0\n", "- hypothesis>=6.110\n"
EXTRA = '\nstreaming = [\n    "pyarrow>=18.0",\n]'
PACKAGING = (
    Edit("pyproject.toml", "\n\n[project.urls]\n", EXTRA, "before"),
    Edit(
        "pyproject.toml",
        'addopts = ["--color=yes"]\n',
        "markers = [\"slow: takes more than about ten seconds; deselect with -m 'not slow'\"]\n",
    ),
    Edit(".gitignore", "*.pyc\n", "*.nbc\n*.nbi\n"),
    *(
        Edit(f"conda-envs/{environment}.yml", anchor, line, "before")
        for system in ("", "windows-")
        for environment in (f"{system}environment-dev", f"{system}environment-test")
        for anchor, line in (("- pytensor>=", PYARROW), ("- ipython>=", HYPOTHESIS))
    ),
    # PyMC's scripts/generate_pip_deps_from_conda.py writes the same lines.
    Edit("requirements-dev.txt", "ipython>=", HYPOTHESIS[2:], "before"),
    Edit("requirements-dev.txt", "pymc-sphinx-theme", PYARROW[2:], "before"),
)
DOCS = (
    Edit(
        "docs/source/api/vi.rst",
        "Operators\n---------\n",
        "Streaming\n---------\n\n.. toctree::\n   :maxdepth: 1\n\n   ../streaming/index\n\n",
        "before",
    ),
)

COMMITS = (
    Commit(
        "Let shared variables of a model offer callbacks to Inference.fit",
        ("pymc/variational/stream_callbacks.py", "tests/variational/test_stream_callbacks.py"),
        HOOK,
    ),
    Commit(
        "Draw anew in every step of a fit without the loss\n\n"
        "compile() looked for random generators in the outputs alone. With score=False the step\n"
        "function has none, so that each step repeated one draw: a ~ Normal(3, 2) got an sd of 22.",
        ("tests/variational/test_random_steps.py",),
        RANDOM_STEPS,
    ),
    Commit(
        "Read rows of arrays, Arrow and Parquet in blocks",
        (
            FACADE,
            *(f"{MODULES}/{name}.py" for name in ("__init__", "errors", "utils")),
            f"{TESTS}/*.py",
            *_subpackage("sources", "sources", "object_stores"),
        ),
        PACKAGING,
    ),
    Commit("Shuffle rows in a bounded window, and read ahead of it", _subpackage("batches")),
    Commit(
        "Refuse models that minibatches would make wrong",
        tuple(f"{MODULES}/{name}.py" for name in ("likelihood", "contract", "guards")),
    ),
    Commit("Check whether the windows of a stream are exchangeable", _subpackage("order", "order")),
    Commit("Feed minibatches from a stream to pm.fit", (f"{MODULES}/*.py",)),
    Commit(
        "Shuffle tables on disk, exactly and in bounded memory",
        _subpackage("preshuffle", "preshuffle"),
    ),
    Commit(
        "Check and polish fits with all rows, average them over epochs, and predict rows",
        _subpackage("fit", "averaging", "fit_check", "models", "polish"),
    ),
    Commit(
        "Save fits on streams, so that they survive a kill",
        (f"{MODULES}/fit/resume.py", f"{PAGES}/resume.md"),
    ),
    Commit("Document streaming", (f"{PAGES}/**/*",), DOCS),
)
