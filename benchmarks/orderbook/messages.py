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
"""Order-book messages as arrays of integers, and what their markets' names tell."""

import re

from datetime import datetime
from typing import NamedTuple
from zoneinfo import ZoneInfo

import numpy as np
import pyarrow as pa

__all__ = [
    "DELTA",
    "EVENT_SCHEMA",
    "EXCHANGE_ZONE",
    "LEVEL",
    "MONTHS",
    "NO",
    "SNAPSHOT",
    "TRADE",
    "YES",
    "Events",
    "MessageError",
    "close_ms",
]

DELTA, SNAPSHOT, TRADE, LEVEL = range(4)
YES, NO = range(2)
EXCHANGE_ZONE = ZoneInfo("America/New_York")
MONTHS = ["JAN", "FEB", "MAR", "APR", "MAY", "JUN", "JUL", "AUG", "SEP", "OCT", "NOV", "DEC"]


class MessageError(ValueError):
    """A message that cannot be what the exchange sent."""


class Events(NamedTuple):
    """Messages as parallel arrays, in the order in which they were received.

    A snapshot is one `SNAPSHOT` whose size is a number of levels, followed by that many `LEVEL`
    events; every other message is one event.
    """

    kind: np.ndarray
    """uint8: `DELTA`, `SNAPSHOT`, `TRADE` or `LEVEL`."""
    side: np.ndarray
    """uint8: `YES` or `NO`."""
    price: np.ndarray
    """int64, in 1e-4 dollars."""
    size: np.ndarray
    """int64, in 1e-2 contracts; signed in a delta."""
    seq: np.ndarray
    """int64, the number of the message on its channel; -1 if it has none."""
    ts_ms: np.ndarray
    """int64, the exchange's time; the time of receipt where a message has none."""
    recv_ms: np.ndarray
    """int64, the local time of receipt; the exchange's time where a message has none."""


EVENT_SCHEMA = pa.schema(
    [("kind", pa.uint8()), ("side", pa.uint8())]
    + [(name, pa.int64()) for name in ("price", "size", "seq", "ts_ms", "recv_ms")]
)


def close_ms(market: str) -> int | None:
    """Tell when *market* closes, in milliseconds since 1970, if its ticker says so.

    ``KXGOLD15M-26AUG102115-15`` closes on 10 August 2026 at 21:15 Eastern time.
    """
    found = re.search(r"-(\d\d)([A-Z]{3})(\d\d)(\d\d)(\d\d)-", market)
    if found is None or found[2] not in MONTHS:
        return None
    year, day, hour, minute = (int(found[i]) for i in (1, 3, 4, 5))
    month = MONTHS.index(found[2]) + 1
    try:
        close = datetime(2000 + year, month, day, hour, minute, tzinfo=EXCHANGE_ZONE)
    except ValueError as error:
        raise MessageError(f"market {market}: its ticker names no time of close: {error}") from None
    return int(close.timestamp()) * 1000
