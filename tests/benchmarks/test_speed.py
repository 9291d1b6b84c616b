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
"""Lanes take turns, and tables say what the turns were."""

import importlib
import os

from functools import partial
from pathlib import Path

import pytensor
import pytest

from benchmarks import cases, speed
from benchmarks.cases import Case, Data
from benchmarks.harness import Lane, Turn, filled, markdown, measure, race, ratio
from pymc.variational.streaming import OrderWarning

PAGE = (Path(__file__).parents[2] / "docs/source/speed.md").read_text()


@pytest.fixture
def small_lanes(monkeypatch):
    """Import the lanes by themselves: below ``tests``, each of their processes would load PyMC."""
    monkeypatch.syspath_prepend(Path(__file__).parent)
    return importlib.import_module("small_lanes")


def lane_of(*seconds):
    """Return what looks like a lane that has taken turns."""
    lane = Lane.__new__(Lane)
    lane.turns = [Turn(each, 2 * each) for each in seconds]
    return lane


def test_lanes_take_turns_in_processes_of_their_own(small_lanes):
    flags = os.environ.get("PYTENSOR_FLAGS")
    lanes = {
        "short": Lane(small_lanes.sleeper, 0.01),
        "spin": Lane(small_lanes.spinner, PYTENSOR_FLAGS="floatX=float32"),
    }
    assert os.environ.get("PYTENSOR_FLAGS") == flags
    race(lanes.values(), turns=2)
    assert [len(lane.turns) for lane in lanes.values()] == [2, 2]
    assert lanes["short"].median("seconds") >= 0.01
    assert lanes["short"].median("processor_seconds") < 0.005
    assert lanes["spin"].median("processor_seconds") == pytest.approx(0.01, rel=0.2)


def test_a_lane_that_fails_to_start_is_an_error(small_lanes):
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        race([Lane(small_lanes.sleeper)], turns=1)


def test_ratio_is_of_turns_next_to_each_other():
    """A machine that slows down by and by does not change it."""
    assert ratio(lane_of(1, 2, 4), lane_of(3, 6, 12)) == "3.00 (3.00 to 3.00)"
    assert ratio(lane_of(1, 1, 1), lane_of(1, 2, 3)) == "2.00 (1.50 to 2.50)"


def test_a_line_of_the_table_says_what_its_turns_were():
    lanes = {speed.LIMIT: lane_of(0.001), "mine": lane_of(0.002), speed.MEMORY: lane_of(0.005)}
    table = markdown(f"rows | {speed.HEADS}", speed.speeds(lanes))
    head, rule, _, mine, _ = table.splitlines()
    ratios = "0.50 (0.50 to 0.50) | 2.50 (2.50 to 2.50)"
    assert mine == f"| mine | 500 | 2.000 | 4.000 | {ratios} |"
    assert head.count("|") == rule.count("|") == mine.count("|")


@pytest.mark.parametrize("name", speed.TABLES)
def test_the_page_has_a_place_for_every_table(name):
    assert "new text" in filled(PAGE, name, speed.COMMAND, "new text")


def test_a_table_is_written_once(tmp_path):
    data = Data(tmp_path, 30_000)
    table = data.wide()
    written = [file.stat().st_mtime_ns for file in table.iterdir()]
    assert data.wide() == table
    assert written == [file.stat().st_mtime_ns for file in table.iterdir()]


def test_a_fit_of_another_shape_takes_its_turns(tmp_path):
    case = Case(Data(tmp_path, 10_000).wide(), cases.wide, batch_size=64, buffer_size=256)
    assert case.turn_steps % case.window_steps == 0
    with pytensor.config.change_flags(mode="FAST_COMPILE"):
        run, _ = cases.in_memory(case)
        run(3)


class Here:
    """A lane in this process, which has taken a short turn as soon as it is made."""

    def __init__(self, make, *args):
        run, _ = make(*args)
        run(2)
        self.turns = [Turn(1, 1)]

    median = Lane.median


def test_every_lane_of_the_race_takes_its_turns(tmp_path, monkeypatch):
    """All but that of pymc-extras, whose wheel would be downloaded."""
    monkeypatch.setattr(speed, "Lane", Here)
    monkeypatch.setattr(speed, "race", lambda lanes, turns: None)
    monkeypatch.setattr(speed, "Case", partial(Case, batch_size=64, buffer_size=256))
    monkeypatch.setattr(cases, "on_dataloader", cases.on_one_batch)
    with pytensor.config.change_flags(mode="FAST_COMPILE"), pytest.warns(OrderWarning):
        table = speed.speed(Data(tmp_path, 10_000), 1)
    assert len(table.splitlines()) == 2 + 10


def test_the_first_batch_of_a_stream_is_timed(tmp_path):
    rows = Data(tmp_path, 5_000).order_book()
    assert min(speed.first_batch(rows)) > 0


def test_only_the_table_that_is_asked_for_is_replaced(tmp_path):
    tables = speed.TABLES | {"start": lambda data, turns: f"| {turns} |\n"}
    page = tmp_path / "speed.md"
    page.write_text(PAGE)
    arguments = ["--only", "start", "--turns", "7", "--page", str(page)]
    measure(speed.COMMAND, tables, arguments, rows=9, turns=9)
    assert page.read_text() == filled(PAGE, "start", speed.COMMAND, "| 7 |\n")
