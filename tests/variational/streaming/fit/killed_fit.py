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
"""Kill a fit in several ways, go on each time, and compare with a fit that was left alone.

``python -m tests.variational.streaming.fit.killed_fit FOLDER`` runs each piece in a process of its own.
"""

import io
import os
import signal
import sys
import threading
import time

from collections.abc import Callable
from functools import partial
from itertools import chain, repeat
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import pymc as pm

from pymc.variational.streaming import (
    StreamingDataset,
    parquet_source,
    resumable_fit,
    shuffle_buffer,
)
from tests.variational.streaming.preshuffle.killed import in_child

N_STEPS = 400


def main(folder: str) -> None:
    root = Path(folder)
    rng = np.random.default_rng(0)
    table = pa.table({"x": rng.normal(size=5_000), "y": rng.normal(size=5_000)})
    pq.write_table(table, root / "rows.parquet", row_group_size=500)
    whole, pieces = root / "whole", root / "pieces"
    assert in_child(lambda: fit(root, whole, seed=1)) == 0
    # Only the first piece has the seed: the others know no more than the file.
    ways = [(die_half_written, 1), (die_at_a_moment, None)]
    kills = sum(in_child(lambda w=way, s=seed: fit(root, pieces, w, s)) != 0 for way, seed in ways)
    assert in_child(lambda: fit(root, pieces)) == 0
    with np.load(whole) as expected, np.load(pieces) as found:
        assert expected["losses"].shape == (N_STEPS,)
        for name in expected:
            np.testing.assert_array_equal(found[name], expected[name], err_msg=name)
    assert sorted(os.listdir(root)) == ["pieces", "rows.parquet", "whole"]
    sys.stdout.write(f"same numbers after {kills} kills\n")


def fit(root: Path, path: Path, way: Callable | None = None, seed: int | None = None) -> None:
    source = parquet_source(root / "rows.parquet")
    buffer = shuffle_buffer(source, buffer_size=1_000, batch_size=64, seed=0)
    ds = StreamingDataset(buffer, batch_size=64, order_check="off")
    with pm.Model():
        a = pm.Normal("a")
        sigma = pm.HalfNormal("sigma")
        pm.Normal("y", a * ds["x"], sigma, observed=ds["y"], total_size=ds.total_size)
        resumable_fit(
            pm.ADVI(random_seed=seed),
            N_STEPS,
            path=path,
            datasets=[ds],
            every=40,
            callbacks=[] if way is None else [way()],
            progressbar=False,
            compile_kwargs={"mode": "FAST_COMPILE"},
            obj_optimizer=pm.adam(learning_rate=0.05),
        )


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def nothing(*args: object) -> None:
    pass


def die_half_written() -> Callable:
    savez = np.savez

    def write_half(file, **arrays):
        whole = io.BytesIO()
        savez(whole, **arrays)
        file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
        file.flush()
        if len(arrays["losses"]) == 80:
            die()
        file.write(whole.getvalue()[len(whole.getvalue()) // 2 :])

    np.savez = write_half
    return nothing


def die_at_a_moment() -> Callable:
    """Die up to 0.3 s after the first step; the last of 320 steps of a millisecond is later."""
    timer = threading.Timer(np.random.default_rng().uniform(0, 0.3), die)
    timer.daemon = True
    actions = chain([timer.start], repeat(partial(time.sleep, 0.001)))
    return lambda *args: next(actions)()


if __name__ == "__main__":
    main(*sys.argv[1:])
