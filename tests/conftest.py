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
import gc
import os
import sysconfig

from importlib.util import find_spec
from pathlib import Path

import hypothesis
import pytensor
import pytest

from tests import CHECKOUT, TEST_INSTALLED

INSTALLED = Path(sysconfig.get_path("purelib"), "pymc", "variational")

# The first example compiles a model, so no profile has a deadline.
hypothesis.settings.register_profile("ci", deadline=None, print_blob=True, derandomize=True)
hypothesis.settings.register_profile("dev", deadline=None, print_blob=True)
hypothesis.settings.load_profile("ci" if TEST_INSTALLED or os.environ.get("CI") else "dev")


pytensor.config.cxx = ""  # g++ would take longer for each operation than the tests do


def pytest_report_header() -> str:
    return f"testing the files in {INSTALLED if TEST_INSTALLED else CHECKOUT}"


def pytest_sessionstart() -> None:
    """Refuse to test another copy than the one that was asked for."""
    expected = INSTALLED if TEST_INSTALLED else CHECKOUT
    for name in ("streaming", "_streaming"):
        spec = find_spec(f"pymc.variational.{name}")
        if spec is None or not Path(spec.origin).is_relative_to(expected):
            found = spec and spec.origin
            raise pytest.UsageError(
                f"expected {name} in {expected}, found {found}; try `make test`"
            )


def pytest_collection_finish() -> None:
    """Hide what was imported from the garbage collector, which takes a tenth of the time with it."""
    gc.collect()
    gc.freeze()
