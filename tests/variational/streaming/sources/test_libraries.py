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
"""The how-tos of docs/source/streaming/sources.md run as they stand, with the real libraries."""

import gc
import os
import sys

from contextlib import suppress

import numpy as np
import pytest

from pymc.variational.streaming import StreamingDataset
from tests.variational.streaming.held import open_files
from tests.variational.streaming.memory import in_clean_process
from tests.variational.streaming.sources.libraries import COLUMNS, HOW_TOS, book, peaks, run

N_ROWS = 2_500
SLACK = 40
"""MB; the many rows are at least 50 MB more than the few."""

# Their own modules warn of what is none of a user's business.
quietly = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module", params=HOW_TOS)
def heading(request, tmp_path_factory):
    """Write the rows that the how-to reads, and go to where they are."""
    library, write = HOW_TOS[request.param]
    with suppress(DeprecationWarning):
        pytest.importorskip(library)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("rows"))
        write(book(N_ROWS))
        yield request.param


def expected() -> np.ndarray:
    return np.column_stack([column.to_numpy() for column in book(N_ROWS).columns])


@quietly
def test_every_epoch_gives_the_rows_in_the_same_order(heading):
    with StreamingDataset(run("sources.md", heading)["source"], batch_size=N_ROWS) as ds:
        assert ds.total_size == N_ROWS
        assert ds.columns in (COLUMNS, None)
        for _ in range(2):
            assert ds.advance()
            batch = ds.as_tensor().get_value()
            np.testing.assert_array_equal(batch.astype("float32"), expected())


@quietly
def test_passes_that_overlap_do_not_disturb_each_other(heading):
    ds = StreamingDataset(run("sources.md", heading)["source"], batch_size=500)
    first, second = iter(ds), iter(ds)
    pairs = [(next(first), next(second)) for _ in range(3)]
    rest = [*first], [*second]
    for pair, left in zip(zip(*pairs), rest):
        np.testing.assert_array_equal(np.concatenate([*pair, *left]).astype("f4"), expected())


@quietly
def test_an_abandoned_pass_leaves_no_open_file(heading):
    if heading in ("Arrays and memory maps", "Hugging Face datasets"):
        pytest.skip("the array or data set itself holds the map")
    ds = StreamingDataset(run("sources.md", heading)["source"], batch_size=500)
    ds.advance()
    ds.close()
    del ds
    gc.collect()
    assert not [file for file in open_files() if file.startswith(os.getcwd())]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    "title, few, many, own",
    [
        ("DuckDB", 1_000_000, 6_000_000, False),
        ("Arrow IPC and Feather files", 1_000_000, 6_000_000, False),
        ("Arrays and memory maps", 1_000_000, 6_000_000, True),
        ("zarr, h5py, xarray and dask arrays", 250_000, 2_000_000, False),
    ],
)
def test_memory_does_not_grow_with_the_rows(title, few, many, own, tmp_path, monkeypatch):
    """Many rows after few; of mapped files only what is the process's `own` counts."""
    library, write = HOW_TOS[title]
    pytest.importorskip(library)
    folders = [tmp_path / "few", tmp_path / "many"]
    for folder, n_rows in zip(folders, (few, many)):
        folder.mkdir()
        monkeypatch.chdir(folder)
        write(book(n_rows))
    found = in_clean_process(peaks, title, *folders)
    first, second = (memory[own] for memory in found)
    assert second < first + SLACK, f"{found} MB"
