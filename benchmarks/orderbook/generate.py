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

"""Make synthetic order-book messages whose regime drifts through the whole table.

    python -m benchmarks.orderbook.generate MESSAGES --messages 2_500_000 --seed 0

Markets of 15 minutes follow each other in several series, as Kalshi's do. While time goes from 0
to 1 over all of them, the level of the mid, the width of the spread, the lean of the book and the
rates of up and down moves drift, and so does the *relation* between features and the next move:
a heavy bid announces a rise in the beginning and a fall in the end. A posterior fitted to
a window of time is therefore wrong for the table, which is what these messages are for.
No conclusion about a real market can be drawn from them.
"""

import argparse
import gzip
import json

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.orderbook.book import (
    DELTA,
    EVENT_SCHEMA,
    EXCHANGE_ZONE,
    LEVEL,
    MONTHS,
    NO,
    SNAPSHOT,
    YES,
    Events,
)
from benchmarks.orderbook.publish import bar, published, run_command
from benchmarks.orderbook.simulate import FEWEST_MESSAGES, Market, simulate

__all__ = ["generate", "main", "plan"]

SERIES = ("KXSYNA15M", "KXSYNB15M", "KXSYNC15M", "KXSYND15M")
FIRST_OPEN_MS = 1_786_406_400_000  # 2026-08-11 00:00 UTC
QUARTER_MS = 900_000
MESSAGES_PER_MARKET = 100_000
RESUBSCRIBED_EVERY = 3


def generate(
    destination: str | Path,
    *,
    messages: int,
    seed: int,
    file_format: Literal["json", "parquet"] = "json",
    workers: int = 2,
    overwrite: bool = False,
    progressbar: bool = True,
) -> None:
    """Write synthetic messages of several markets.

    Parameters
    ----------
    destination : str or Path
        Directory that appears when all of its files are complete:
        ``<market>/<date>.ndjson.gz`` or ``<market>/<date>.parquet``.
    messages : int
        Messages in total, exactly: snapshots, deltas and trades.
    seed : int
        The same seed and number give the same messages.
    file_format : {"json", "parquet"}
        Kalshi's JSON lines, or the same content in columns.
    workers : int
        Markets written at the same time.
    overwrite : bool
        Replace *destination* if it exists.
    progressbar : bool
        Show the progress.

    Notes
    -----
    Memory does not depend on *messages*: each worker holds a block of one market.
    """
    if file_format not in ("json", "parquet"):
        raise ValueError(f'file_format must be "json" or "parquet", got {file_format!r}')
    markets = plan(messages, seed)
    with published(destination, overwrite=overwrite) as (content, _), bar(progressbar) as progress:
        task = progress.add_task("Generating messages", total=messages)

        def write(market: Market) -> None:
            directory = content / market.ticker
            directory.mkdir()
            day = datetime.fromtimestamp(market.open_ms / 1000, UTC).date().isoformat()
            if file_format == "json":
                _write_json(directory / f"{day}.ndjson.gz", market.ticker, simulate(market))
            else:
                _write_parquet(directory / f"{day}.parquet", simulate(market))
            progress.advance(task, market.n_messages)

        with ThreadPoolExecutor(workers) as pool:
            for _ in pool.map(write, markets):
                pass


def plan(messages: int, seed: int) -> list[Market]:
    """Divide *messages* among markets, in the order of time."""
    n_windows = max(1, round(messages / MESSAGES_PER_MARKET / len(SERIES)))
    n_markets = n_windows * len(SERIES)
    if messages < FEWEST_MESSAGES * n_markets:
        raise ValueError(f"messages must be at least {FEWEST_MESSAGES * n_markets}, got {messages}")
    bounds = np.linspace(0, messages, n_markets + 1).astype(int)
    seeds = np.random.SeedSequence(seed).spawn(n_markets)
    return [
        _market(i, n_windows, int(bounds[i + 1] - bounds[i]), seeds[i]) for i in range(n_markets)
    ]


def _market(number: int, n_windows: int, n_messages: int, seed: np.random.SeedSequence) -> Market:
    window, series = divmod(number, len(SERIES))
    open_ms = FIRST_OPEN_MS + window * QUARTER_MS
    close_ms = open_ms + QUARTER_MS
    return Market(
        ticker=_ticker(SERIES[series], close_ms),
        open_ms=open_ms,
        close_ms=close_ms,
        n_messages=n_messages,
        # The markets of a window share the socket's numbers.
        seq=(1_000_000 + number + window * len(SERIES) * n_messages, len(SERIES)),
        span=(window / n_windows, (window + 1) / n_windows),
        resubscribes=number % RESUBSCRIBED_EVERY == 1,
        seed=seed,
    )


def _ticker(series: str, close_ms: int) -> str:
    close = datetime.fromtimestamp(close_ms / 1000, EXCHANGE_ZONE)
    month = MONTHS[close.month - 1]
    return f"{series}-{close:%y}{month}{close:%d%H%M}-{close:%M}"


def _write_json(path: Path, market: str, blocks: Iterable[Events]) -> None:
    """Write gzipped lines; each snapshot must be a block of its own."""
    with path.open("wb") as raw, gzip.GzipFile("", "wb", 1, raw, mtime=0) as file:
        with duckdb.connect(config={"threads": 1}) as connection:
            connection.execute(f"SET VARIABLE market = '{market}'")
            for block in blocks:
                if len(block.kind) and block.kind[0] == SNAPSHOT:
                    file.write(_snapshot_line(market, block))
                else:
                    events = pa.table(list(block), schema=EVENT_SCHEMA)
                    for lines in connection.sql(LINES).to_arrow_table()[0].chunks:
                        file.write("".join(lines.to_pylist()).encode())


LINES = f"""
    WITH named AS (
        SELECT *, getvariable('market') AS market, if(side = {YES}, 'yes', 'no') AS outcome,
            printf('%.4f', price / 1e4) AS dollars, printf('%.2f', size / 1e2) AS contracts
        FROM events)
    SELECT CASE WHEN kind = {DELTA}
        THEN to_json({{recv_ms: recv_ms, event: {{type: 'orderbook_delta', sid: 1, seq: seq, msg:
            {{market_ticker: market, price_dollars: dollars, delta_fp: contracts, side: outcome,
            ts_ms: ts_ms}}}}}})
        ELSE to_json({{recv_ms: recv_ms, event: {{type: 'trade', sid: 2, seq: seq, msg:
            {{market_ticker: market, yes_price_dollars: dollars, count_fp: contracts,
            taker_side: outcome, ts_ms: ts_ms}}}}}})
        END::VARCHAR || chr(10) FROM named"""
"""The keys of Kalshi's messages that a book needs, and some of those of its trades."""


def _snapshot_line(market: str, events: Events) -> bytes:
    message: dict[str, object] = {"market_ticker": market}
    for side, key in ((YES, "yes_dollars_fp"), (NO, "no_dollars_fp")):
        rows = (events.kind == LEVEL) & (events.side == side)
        levels = zip(events.price[rows].tolist(), events.size[rows].tolist())
        # An empty side has no key.
        if rows.any():
            message[key] = [[f"{price / 1e4:.4f}", f"{size / 1e2:.2f}"] for price, size in levels]
    event = {"type": "orderbook_snapshot", "sid": 1, "seq": int(events.seq[0]), "msg": message}
    line = {"recv_ms": int(events.recv_ms[0]), "event": event}
    return json.dumps(line, separators=(",", ":")).encode() + b"\n"


def _write_parquet(path: Path, blocks: Iterable[Events]) -> None:
    with pq.ParquetWriter(path, EVENT_SCHEMA, compression="zstd") as writer:
        for events in blocks:
            writer.write_batch(pa.record_batch(list(events), schema=EVENT_SCHEMA))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.orderbook.generate",
        description="Write synthetic order-book messages whose regime drifts.",
    )
    parser.add_argument("destination", type=Path, help="directory to make")
    parser.add_argument("--messages", type=int, default=2_500_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--format", dest="file_format", choices=("json", "parquet"), default="json")
    parser.add_argument("--workers", type=int, default=2, help="markets written at the same time")
    run_command(parser, generate, arguments)


if __name__ == "__main__":
    main()
