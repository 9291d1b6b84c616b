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
"""Messages as Kalshi sends them, and files of them."""

import json

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.orderbook.book import EVENT_SCHEMA, YES, Events, MessageError
from benchmarks.orderbook.fold import fold
from tests.orderbook.naive import SIDES

CLOSE_MS = 1_786_410_900_000
START_MS = CLOSE_MS - 900_000
MARKET = "KXSYNA15M-26AUG102115-15"
OTHER = "KXSYNB15M-26AUG102115-15"


def dollars(price):
    return f"{price // 10_000}.{price % 10_000:04}"


def contracts(size):
    return f"{'-' * (size < 0)}{abs(size) // 100}.{abs(size) % 100:02}"


def message(kind, recv_ms, seq, **body):
    return {"recv_ms": recv_ms, "event": {"type": kind, "sid": 1, "seq": seq, "msg": body}}


def snapshot(recv_ms, seq, yes=(), no=(), *, market=MARKET):
    levels = {"yes_dollars_fp": yes, "no_dollars_fp": no}
    keys = {k: [[dollars(p), contracts(s)] for p, s in v] for k, v in levels.items() if v}
    return message("orderbook_snapshot", recv_ms, seq, market_ticker=market, **keys)


def delta(recv_ms, seq, side, price, size, *, ts_ms=None, market=MARKET):
    body = {"price_dollars": dollars(price), "delta_fp": contracts(size), "side": SIDES[side]}
    body |= {"ts_ms": recv_ms if ts_ms is None else ts_ms}
    return message("orderbook_delta", recv_ms, seq, market_ticker=market, **body)


def trade(recv_ms, seq, *, market=MARKET):
    return message("trade", recv_ms, seq, market_ticker=market, count_fp="1.00", ts_ms=recv_ms)


def altered(original, **changes):
    """Copy a message with other values in its body; None takes the key away."""
    copy = json.loads(json.dumps(original))
    body = copy["event"]["msg"] | changes
    copy["event"]["msg"] = {key: value for key, value in body.items() if value is not None}
    return copy


def numbered(messages, numbers):
    """Give messages other numbers, without which a loss does not show at once."""
    return [m | {"event": m["event"] | {"seq": seq}} for m, seq in zip(messages, numbers)]


def as_lines(messages):
    return [each if isinstance(each, str) else json.dumps(each) for each in messages]


def write_lines(directory, messages, *, market=MARKET, name="2026-08-11.ndjson.gz"):
    path = Path(directory, market, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(f"{line}\n" for line in as_lines(messages)).encode()
    codec = {".gz": "gzip", ".zst": "zstd"}.get(path.suffix)
    with pa.output_stream(path, compression=codec) as file:
        file.write(text)
    return path


def as_events(rows):
    columns = zip(*rows) if rows else [()] * len(Events._fields)
    return Events(*(np.array(c, f.type.to_pandas_dtype()) for c, f in zip(columns, EVENT_SCHEMA)))


def assert_equal_rows(table, features, up):
    columns = [table[name].to_numpy() for name in ("mid", "spread", "imbalance")]
    np.testing.assert_array_equal(np.column_stack(columns), features)
    np.testing.assert_array_equal(table["up"].to_numpy(), up)


def read_rows(directory):
    return pq.read_table(directory)


def folded(tmp_path, messages=None, **options):
    """Fold ``in``, or *messages*; return report and table, and hold that nothing else is left."""
    if messages is not None:
        write_lines(tmp_path / "in", messages)
    report = fold(tmp_path / "in", tmp_path / "out", overwrite=True, progressbar=False, **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]
    states = report.rows + report.no_later_change + report.one_sided + report.after_close
    assert states + report.left_out == report.deltas + report.snapshots
    return report, read_rows(tmp_path / "out")


def refused(tmp_path, match, error=MessageError, messages=None, **options):
    """Hold that ``in``, or *messages*, are refused and that nothing is left of the attempt."""
    if messages is not None:
        write_lines(tmp_path / "in", messages)
    with pytest.raises(error, match=match) as caught:
        fold(tmp_path / "in", tmp_path / "out", progressbar=False, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    return str(caught.value)


START = snapshot(START_MS, 1, [(4800, 100)], [(4800, 100)])
GOOD = [
    START,
    delta(START_MS + 1, 2, YES, 4900, 500),
    delta(START_MS + 2, 3, YES, 4900, -500),
    trade(START_MS + 2, 1),
]
RUN = [delta(START_MS + 10 + i, 2 + i, YES, 4900, 100 if i % 2 == 0 else -100) for i in range(40)]
"""The mid rises and falls with each message."""
