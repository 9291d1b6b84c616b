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
import importlib
import re
import sys

from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import pytest

from pymc.variational.streaming import parquet_source, preshuffle
from tests.variational.streaming.memory import forget_peak, in_clean_process, peak_mb
from tests.variational.streaming.preshuffle.preshuffled import cut_small, digests, every_type
from tests.variational.streaming.sources.object_store import s3_server

ROOT = Path(__file__).parents[4]
PAGE = ROOT / "docs" / "source" / "streaming" / "preshuffle.md"
N_ROWS = 20_000
LOAD = {"initializer": importlib.import_module, "initargs": ("tests",)}
"""Worker processes look for the code under test where this process does."""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Write files that make a dozen tasks: numbers, and columns of words."""
    folder = tmp_path_factory.mktemp("source") / "in"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(4):
        words = pa.array([f"word-{k}" for k in rng.integers(0, 1000, N_ROWS // 4)])
        columns = {f"x{j}": rng.standard_normal(N_ROWS // 4) for j in range(30)}
        table = pa.table({**columns, "word": words.dictionary_encode(), "text": words})
        pq.write_table(table, folder / f"{number}.parquet", row_group_size=1000)
    with pytest.MonkeyPatch.context() as patch:
        cut_small(patch.setattr, block=1 << 20)
        yield folder


@pytest.fixture(scope="module")
def expected(source):
    """Return what one worker, a thread, makes."""
    with ThreadPoolExecutor(1) as pool:
        return shuffle(source, source.parent / "expected", pool)


def shuffle(source, destination, executor):
    report = preshuffle(source, destination, seed=0, executor=executor, progressbar=False)
    assert report.piles > 10
    return digests(destination)


def test_any_number_of_threads_gives_the_same_bytes(source, tmp_path, expected):
    with ThreadPoolExecutor(13) as pool:
        assert shuffle(source, tmp_path / "out", pool) == expected


def test_the_default_executor_gives_the_same_bytes(source, tmp_path, expected):
    assert shuffle(source, tmp_path / "out", None) == expected


@pytest.mark.slow
def test_a_process_gives_the_same_bytes(source, tmp_path, expected):
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), **LOAD) as pool:
        assert shuffle(source, tmp_path / "out", pool) == expected


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_a_dask_cluster_of_processes_gives_the_same_bytes(source, tmp_path, expected, monkeypatch):
    distributed = pytest.importorskip("distributed")
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=2, processes=True, dashboard_address=None
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        client.run(importlib.import_module, "tests")
        with client.get_executor() as executor:
            assert shuffle(source, tmp_path / "out", executor) == expected
        monkeypatch.chdir(tmp_path)
        (tmp_path / "raw").mkdir()
        pq.write_table(pa.table({"x": range(100)}), tmp_path / "raw" / "a.parquet")
        code = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
        (code,) = (block for block in code if "distributed" in block)
        exec(compile(code, PAGE.name, "exec"), {"address": cluster.scheduler_address})
        assert parquet_source(tmp_path / "shuffled").n_rows == 100


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_an_object_store_is_source_and_destination(tmp_path, monkeypatch):
    """By filesystem and by URI."""
    table = every_type(1000).select(["row", "string", "list", "ordered"])
    with s3_server(monkeypatch) as endpoint:
        s3 = pa.fs.S3FileSystem(
            endpoint_override=endpoint,
            scheme="http",
            region="us-east-1",
            allow_bucket_creation=True,
        )
        s3.create_dir("bucket")
        pq.write_table(table, "bucket/in/a.parquet", filesystem=s3, row_group_size=500)
        preshuffle("bucket/in", "bucket/out", seed=0, filesystem=s3, progressbar=False)
        place = f"?scheme=http&endpoint_override={endpoint}&region=us-east-1"
        uris = [f"s3://bucket/{name}{place}" for name in ("in", "other")]
        scratch = tmp_path / "scratch"
        preshuffle(uris[0], uris[1], seed=0, scratch=scratch, progressbar=False)
        assert not list(scratch.iterdir())
        one, other = (read_all(s3, f"bucket/{name}") for name in ("out", "other"))
        assert one.equals(other)

        assert sorted(one["row"].to_pylist()) == table["row"].to_pylist()
        with pytest.raises(FileExistsError, match="exists and is not empty"):
            preshuffle("bucket/in", "bucket/out", seed=0, filesystem=s3, progressbar=False)
        left = s3.get_file_info(pa.fs.FileSelector("bucket", recursive=True))
        files = [info.path for info in left if info.type == pa.fs.FileType.File and info.size]
        assert all("/part-" in path or "/in/" in path for path in files)


def read_all(fs, folder):
    """Read a result on any filesystem, in the order of its files."""
    assert parquet_source(folder, columns=["row"], filesystem=fs).mark is not None
    infos = fs.get_file_info(pa.fs.FileSelector(folder))
    paths = sorted(info.path for info in infos if info.path.endswith(".parquet"))
    return pa.concat_tables([pq.read_table(path, filesystem=fs) for path in paths])


def growth_mb(source, destination, limit, n_threads):
    """Shuffle in a process of its own; return by how much its memory grew, in MB."""
    forget_peak()
    before = peak_mb()
    executor = ThreadPoolExecutor(n_threads) if n_threads else None
    options = {"memory_limit": limit, "executor": executor, "progressbar": False}
    preshuffle(source, destination, seed=0, **options)
    return peak_mb() - before


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    "shape, limit, n_threads",
    [
        ("numbers", 128, 8),
        ("text", 128, 0),
        ("blobs", 128, 0),
    ],
)
def test_memory_grows_by_no_more_than_the_limit(tmp_path, shape, limit, n_threads):
    """Also in an executor with more threads than the limit has room for."""
    rng = np.random.default_rng(0)
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "a.parquet"
    if shape == "numbers":
        table = pa.table({name: rng.random(8_000_000, dtype="f4") for name in "abcd"})
        for size in (200_000, 8_000_000):  # also in a single row group
            path = tmp_path / "in" / f"{size}.parquet"
            pq.write_table(table, path, row_group_size=size, use_dictionary=False)
    elif shape == "text":
        words = pa.array([f"word-{'x' * (k % 60)}-{k}" for k in range(20_000)])
        texts = words.take(pa.array(rng.integers(0, 20_000, 3_000_000)))
        pq.write_table(pa.table({"text": texts, "x": rng.random(3_000_000)}), path)
    else:
        blobs = [rng.bytes(int(size)) for size in rng.integers(0, 100_000, 3000)]
        pq.write_table(pa.table({"blob": blobs}), path, row_group_size=100)
    arguments = tmp_path / "in", tmp_path / "out", f"{limit}MB", n_threads
    assert in_clean_process(growth_mb, *arguments) < limit
