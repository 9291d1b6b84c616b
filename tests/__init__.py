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
"""Tests of ``pymc.variational.streaming``.

Importing this package puts the checkout's files before an installed copy of them, in a test run
and in a child process that runs ``python -m tests...``.
With ``TEST_INSTALLED=1`` in the environment the installed wheel is tested instead.
"""

import os

from pathlib import Path

import pymc.variational

CHECKOUT = Path(__file__).parents[1] / "pymc" / "variational"
TEST_INSTALLED = os.environ.get("TEST_INSTALLED") == "1"

if not TEST_INSTALLED:
    pymc.variational.__path__.insert(0, str(CHECKOUT))
