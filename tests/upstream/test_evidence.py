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
"""The numbers in the text of the pull request are those of the documentation."""

import pytest

from upstream.evidence import DOCS, TEXT, columns, table, with_numbers

PAGES = {name: (DOCS / f"{name}.md").read_text() for name in ("evidence", "speed")}


def test_the_text_has_the_numbers_of_the_pages():
    """After new measurements, run ``python -m upstream.evidence``."""
    assert with_numbers(TEXT.read_text(), PAGES) == TEXT.read_text()


def test_a_new_number_gets_into_the_text():
    pages = PAGES | {"speed": PAGES["speed"].replace("| pm", "| PM").replace("| `pm", "| `PM")}
    assert with_numbers(TEXT.read_text(), pages).count("`PM.Minibatch`") >= 1


def test_a_column_that_is_gone_is_an_error():
    with pytest.raises(ValueError, match="'rows/s' is not in list"):
        columns(table(PAGES["evidence"], "means"), ["rows/s"])
