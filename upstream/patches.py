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
"""Changes to PyMC that streams gain from and the merge does not need.

``python -m upstream.assemble --patch NAME`` adds them, in a checkout as a commit of their own.
"""

from upstream.commits import Commit
from upstream.edits import Edit

__all__ = ["PATCHES"]

PATCHES = {
    "random-steps": Commit(
        "Draw anew in every step of a fit without the loss\n\n"
        "compile() looked for random generators in the outputs alone. With score=False the step\n"
        "function has none, so that each step repeated one draw: a ~ Normal(3, 2) got an sd of 22.",
        edits=(
            Edit(
                "pymc/pytensorf.py",
                "out.variable if isinstance(out, pytensor.Out) else out for out in "
                "makeiter(outputs)\n        ]",
                '\n        + list(kwargs.get("updates", {}).values())',
            ),
        ),
        files=("tests/variational/test_random_steps.py",),
    ),
}
