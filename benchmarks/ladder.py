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
"""How fast the order-book model is fitted under PyMC's settings, and by NumPyro.

    python -m benchmarks.ladder --page docs/source/speed.md

Each fit has a process of its own, since settings hold for a process; all of them take turns, so
that any two lines of the table can be compared.  PyMC computes the loss in every step, as a stream
asks for.  NumPyro fits with SVI, AutoNormal and Adam, in float32, one jitted update for each batch
that comes from the host.  Needs ``jax`` and ``numpyro`` for their lines.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

from benchmarks.data import Data
from benchmarks.fits import (
    LIMIT,
    PEER,
    STREAM,
    Case,
    in_memory_columns,
    on_dataloader,
    on_one_batch,
    on_stream,
    order_book,
)
from benchmarks.pages import measure
from benchmarks.turns import Lane, Runner, race, ratio, taking_turns

__all__ = ["Setting", "ladder"]

COMMAND = "python -m benchmarks.ladder"
MEMORY = "in memory"


@dataclass(frozen=True, slots=True)
class Setting:
    """What fits."""

    name: str
    backend: str | None
    """Of ``pm.fit``; None for NumPyro."""
    dtype: str


SETTINGS = (
    Setting("numba, float64 (default)", "numba", "float64"),
    Setting("numba, float32", "numba", "float32"),
    Setting("C, float32", "c", "float32"),
    Setting("JAX, float32", "jax", "float32"),
    Setting("NumPyro, float32", None, "float32"),
)


def ladder(data: Data, turns: int) -> str:
    """Let all fits take turns, and return the table."""
    ordered = data.order_book()
    case = Case(data.shuffled(ordered), order_book)
    peer = Lane(on_dataloader, Case(ordered, order_book))
    with taking_turns({**_lanes(case), (SETTINGS[0], PEER): peer}) as lanes:
        race(lanes.values(), turns=turns)
    text = (
        "| setting | rows | steps/s | ms per step | CPU ms per step "
        "| speed / own limit | speed / default's limit |\n|---|---|---|---|---|---|---|\n"
    )
    for setting, way in sorted(lanes, key=lambda key: SETTINGS.index(key[0])):
        lane = lanes[setting, way]
        seconds = lane.median("seconds")
        text += (
            f"| {setting.name} | {way} | {1 / seconds:,.0f} | {1e3 * seconds:.3f} "
            f"| {1e3 * lane.median('processor_seconds'):.3f} "
            f"| {ratio(lane, lanes[setting, LIMIT])} "
            f"| {ratio(lane, lanes[SETTINGS[0], LIMIT])} |\n"
        )
    return text


def _lanes(case: Case) -> dict[tuple[Setting, str], Lane]:
    lanes = {}
    for setting in SETTINGS:
        backend = () if setting.backend is None else (setting.backend,)
        for way, make in _ways(setting).items():
            lanes[setting, way] = Lane(make, case, *backend, flags=f"floatX={setting.dtype}")
    return lanes


def _ways(setting: Setting) -> dict[str, Callable[..., Runner]]:
    if setting.backend is None:
        return _numpyro_ways()
    if setting.backend == "jax" and find_spec("jax") is None:
        return {}
    in_memory = {MEMORY: in_memory_columns} if setting == SETTINGS[0] else {}
    return {LIMIT: on_one_batch, STREAM: on_stream, **in_memory}


def _numpyro_ways() -> dict[str, Callable[..., Runner]]:
    if find_spec("numpyro") is None:
        return {}
    from benchmarks import numpyro_fits

    return {
        LIMIT: numpyro_fits.on_one_batch,
        STREAM: numpyro_fits.on_stream,
        MEMORY: numpyro_fits.in_memory,
    }


if __name__ == "__main__":
    measure(COMMAND, {"ladder": ladder}, rows=20e6, turns=9)
