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
"""The suites are what ASV expects, and what it would not tell of."""

import numbers

from itertools import product

import pytest

from benchmarks.suites import streaming
from benchmarks.suites.streaming import TableSuite

SUITES = {
    name: suite
    for name, suite in vars(streaming).items()
    if isinstance(suite, type) and issubclass(suite, TableSuite) and name != "TableSuite"
}


def benchmarks(suite):
    return [name for name in dir(suite) if name.startswith(("time_", "track_", "peakmem_"))]


@pytest.mark.parametrize("name", SUITES)
def test_names_end_in_suite_and_params_are_numbers(name):
    assert name.endswith("Suite") and benchmarks(SUITES[name])
    values = [*product(*SUITES[name].params)]
    assert all(isinstance(value, numbers.Number) for row in values for value in row)
    assert len(SUITES[name].param_names) == len(SUITES[name].params)


@pytest.mark.parametrize("name", SUITES)
def test_what_is_tracked_has_a_unit_and_no_peak_is_inherited(name):
    for benchmark in benchmarks(SUITES[name]):
        if benchmark.startswith("track_"):
            assert getattr(SUITES[name], benchmark).unit
        assert not benchmark.startswith("peakmem_"), "ru_maxrss starts at the parent's peak"


def test_a_suite_runs_on_a_small_table(tmp_path, monkeypatch):
    """The others run in the smoke run of ASV itself."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(TableSuite, "params", [[20_000]])
    suite = SUITES["ReadingSuite"]()
    data = suite.setup_cache()
    suite.setup(data, 20_000)
    for name in benchmarks(SUITES["ReadingSuite"]):
        getattr(suite, name)(data, 20_000)
