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
"""Streams from object stores: the same rows, or an error that names the file."""

import re
import sys
import time

from collections import Counter
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import pytest

from pymc.variational._streaming.sources.parquet import remote
from pymc.variational.streaming import StreamError, parquet_source
from tests.variational.streaming.resident import SLACK, growth_mb
from tests.variational.streaming.sources.libraries import ROOT
from tests.variational.streaming.sources.object_store import Proxy, s3_server
from tests.variational.streaming.strategies import rows_of

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")

N_ROWS = 200_000
MIDDLE = 500_000, 1_500_000
"""Bytes between which neither the first read of a file begins nor that of its footer."""


@pytest.fixture(scope="module")
def rows():
    return np.random.default_rng(0).random((N_ROWS, 2))


@pytest.fixture(scope="module")
def server():
    with pytest.MonkeyPatch.context() as environment, s3_server(environment) as endpoint:
        yield endpoint


@pytest.fixture(scope="module")
def bucket(server, rows):
    """Put a folder of two files in a bucket, and one with page checksums in another folder."""
    fs = connect(server, allow_bucket_creation=True, request_timeout=60)
    fs.create_dir("bucket")
    for number, half in enumerate(np.split(rows, 2)):
        write(fs, f"bucket/in/{number}.parquet", half)
    write(fs, "bucket/checked/0.parquet", rows, write_page_checksum=True)
    for number in range(20):
        write(fs, f"bucket/many/{number:02}.parquet", rows[number : number + 1])
    return fs


@pytest.fixture
def proxy(server, bucket, monkeypatch):
    """Stand before the server, at the endpoint that the environment names."""
    monkeypatch.setattr(remote, "_WAITS", (0.05,) * 4)
    proxy = Proxy(server)
    with proxy.serve():
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{proxy.endpoint}")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        yield proxy


def connect(endpoint, **options):
    return pa.fs.S3FileSystem(
        endpoint_override=endpoint, scheme="http", region="us-east-1", **options
    )


def write(fs, path, rows, **options):
    table = pa.table({"x": rows[:, 0], "y": rows[:, 1]})
    pq.write_table(table, path, filesystem=fs, use_dictionary=False, compression="none", **options)


def s3fs_filesystem():
    """Make one that remembers nothing of other tests."""
    s3fs = pytest.importorskip("s3fs")
    fs = s3fs.S3FileSystem(skip_instance_cache=True, client_kwargs={"region_name": "us-east-1"})
    fs.retries = 1  # what follows is our own
    return fs


def open_uri(folder, endpoint):
    return parquet_source(f"s3://bucket/{folder}")


def open_pyarrow(folder, endpoint):
    """Leave new attempts to us, and give up what stalls sooner than by default."""
    once = pa.fs.AwsStandardS3RetryStrategy(max_attempts=1)
    fs = connect(endpoint, retry_strategy=once, request_timeout=1)
    return parquet_source(f"bucket/{folder}", filesystem=fs)


def open_fsspec(folder, endpoint):
    return parquet_source(f"bucket/{folder}", filesystem=s3fs_filesystem())


clients = pytest.mark.parametrize("client", [open_uri, open_pyarrow, open_fsspec])


@clients
def test_every_client_reads_the_same_rows(proxy, rows, client):
    source = client("in", proxy.endpoint)
    assert source.n_rows == N_ROWS
    np.testing.assert_array_equal(rows_of(source), rows)
    assert all(request.signed for request in proxy.requests)


@pytest.mark.parametrize(
    "path",
    [
        "s3://bucket/in/*.parquet",
        "s3://bucket/i*/**",
        ["s3://bucket/in/0.parquet", "s3://bucket/in/1.parquet"],
    ],
    ids=["glob", "glob of folders", "list"],
)
def test_globs_and_lists_of_uris_are_paths(proxy, rows, path):
    found = rows_of(parquet_source(path))
    np.testing.assert_array_equal(found, rows)


@clients
def test_many_footers_are_read_at_once_and_asked_for_once(proxy, client):
    proxy.fail("wait")
    assert client("many", proxy.endpoint).n_rows == 20
    assert proxy.most_reading >= 8
    reads = Counter(r.path for r in proxy.requests if r.method == "GET" and "many/" in r.path)
    assert list(reads.values()) == [1] * 20


def test_anonymous_requests_are_not_signed(proxy, rows):
    source = parquet_source("bucket/in", filesystem=connect(proxy.endpoint, anonymous=True))
    np.testing.assert_array_equal(rows_of(source), rows)
    assert not any(request.signed for request in proxy.requests)


def test_filesystems_do_not_mix_in_a_list(proxy, tmp_path):
    pq.write_table(pa.table({"x": [1.0], "y": [1.0]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="more than one filesystem"):
        parquet_source(["s3://bucket/in/0.parquet", tmp_path / "a.parquet"])


@pytest.mark.parametrize(
    "client, fault",
    [
        *((open_uri, fault) for fault in ("throttle", "error", "refuse", "drop")),
        (open_pyarrow, "drop"),
        (open_fsspec, "throttle"),
        (open_fsspec, "drop"),
    ],
)
def test_a_fault_in_the_middle_of_an_epoch_loses_and_repeats_no_row(proxy, rows, client, fault):
    source = client("in", proxy.endpoint)
    proxy.fail(fault, times=2, only="1.parquet", span=MIDDLE)
    np.testing.assert_array_equal(rows_of(source), rows)
    assert sum(request.fault == fault for request in proxy.requests) == 2


@pytest.mark.slow
def test_an_answer_that_stalls_is_given_up_and_asked_for_again(proxy, rows):
    source = open_pyarrow("in", proxy.endpoint)
    proxy.fail("stall", times=1, only="1.parquet", span=MIDDLE)
    np.testing.assert_array_equal(rows_of(source), rows)


@pytest.mark.parametrize(
    "client, fault",
    [(open_pyarrow, "throttle"), (open_fsspec, "drop")],
)
def test_a_fault_that_stays_ends_the_epoch_with_the_name_of_the_file(
    proxy, rows, client, fault, monkeypatch
):
    monkeypatch.setattr(remote, "_WAITS", (0.05,))
    source = client("in", proxy.endpoint)
    proxy.fail(fault, only="1.parquet", span=MIDDLE)
    blocks = []
    with pytest.raises(StreamError, match=r"in/1\.parquet: reading failed .*after 2 attempts"):
        blocks.extend(source)
    found = np.concatenate(blocks)
    np.testing.assert_array_equal(found, rows[: len(found)])


@pytest.mark.parametrize("client", [open_pyarrow, open_fsspec])
def test_an_expired_credential_is_named(proxy, client):
    """pyarrow sometimes misses the text of the answer; then only its status tells."""
    source = client("in", proxy.endpoint)
    proxy.fail("expire", only="1.parquet")
    with pytest.raises(StreamError, match=r"in/1\.parquet: .*renew the credential"):
        rows_of(source)


def test_an_expired_credential_is_not_tried_again(caplog):
    def read():
        raise PermissionError("The provided token has expired.")

    with pytest.raises(PermissionError, match=r"expired\.; renew the credential, which has"):
        remote.retried(read)
    assert not caplog.records


def test_a_store_that_is_gone_when_an_epoch_begins_is_a_stream_error(proxy, monkeypatch):
    monkeypatch.setattr(remote, "_WAITS", (0.05,))
    source = open_pyarrow("in", proxy.endpoint)
    proxy.fail("throttle")
    with pytest.raises(StreamError, match=r"in/0\.parquet: .*after 2 attempts"):
        rows_of(source)


def test_a_store_that_is_gone_in_the_middle_of_an_epoch_is_not_a_changed_file(monkeypatch):
    memory = pytest.importorskip("fsspec").filesystem("memory")
    with memory.open("/gone/a.parquet", "wb") as file:
        pq.write_table(pa.table({"x": np.random.default_rng(0).random(N_ROWS * 3)}), file, 262_144)
    blocks = iter(parquet_source("/gone", filesystem=memory))
    next(blocks)

    def refuse(*args, **kwargs):
        raise OSError("connection refused")

    monkeypatch.setattr(remote, "_WAITS", ())
    for name in ("cat_file", "info"):
        monkeypatch.setattr(memory, name, refuse)
    with pytest.raises(StreamError, match=r"a\.parquet: reading failed \(connection refused; gave"):
        list(blocks)


def test_a_file_of_unknown_size_is_named(monkeypatch):
    """Such as one of a server that makes its answers while it sends them."""
    memory = pytest.importorskip("fsspec").filesystem("memory")
    memory.pipe("/unsized/a.parquet", b"PAR1")
    info = {"name": "/unsized/a.parquet", "type": "file", "size": None}
    monkeypatch.setattr(memory, "info", lambda *args, **kwargs: info)
    with pytest.raises(StreamError, match=r"a\.parquet: .* does not tell its size; copy it to a"):
        parquet_source("/unsized/a.parquet", filesystem=memory)


def test_short_answers_are_asked_for_again_and_logged(proxy, rows, caplog):
    source = open_fsspec("in", proxy.endpoint)
    proxy.fail("truncate", times=2, only="1.parquet", span=MIDDLE)
    np.testing.assert_array_equal(rows_of(source), rows)
    told = [record.message for record in caplog.records if record.name.endswith("parquet.remote")]
    assert len(told) == 2 and "attempt 2 follows in 0.05 s" in told[0]


def test_short_answers_that_pyarrow_hides_are_caught_by_page_checksums(proxy):
    source = open_pyarrow("checked", proxy.endpoint)
    proxy.fail("truncate", times=1, only="0.parquet", span=MIDDLE)
    with pytest.raises(StreamError, match=r"checked/0\.parquet: reading failed"):
        rows_of(source)


@clients
@pytest.mark.parametrize("when", ["between epochs", "while it is read"])
def test_an_object_that_changed_is_noticed(proxy, bucket, rows, client, when):
    """The new object has the same size and footer; its time has moved by a second or more."""
    fs, folder, rows = bucket, f"changing-{when.split()[0]}", rows[:1_000]
    write(fs, f"bucket/{folder}/0.parquet", rows, write_statistics=False)
    source = client(folder, proxy.endpoint)
    first = fs.get_file_info(f"bucket/{folder}/0.parquet").mtime
    blocks = iter(source)
    if when == "while it is read":
        next(blocks)
    while fs.get_file_info(f"bucket/{folder}/0.parquet").mtime == first:
        time.sleep(0.2)
        write(fs, f"bucket/{folder}/0.parquet", rows[::-1], write_statistics=False)
    with pytest.raises(StreamError, match=r"0\.parquet: changed"):
        list(blocks)


@clients
def test_an_epoch_reads_each_byte_once_in_few_requests(proxy, client):
    """Of 1.6 MB a file: two columns of 0.8 MB, and the last 64 KiB, which hold the footer."""
    source = client("in", proxy.endpoint)
    proxy.requests.clear()
    rows_of(source)
    reads = [r for r in proxy.requests if r.method == "GET" and "parquet" in r.path]
    size = sum(1_600_000 // 2 * 2 + (1 << 16) for _ in range(2))
    assert sum(r.length for r in reads) < 1.02 * size
    assert len(proxy.requests) <= 2 * 8


def test_the_code_on_the_page_runs(proxy, bucket, rows, monkeypatch):
    write(bucket, "bucket/shuffled/0.parquet", rows)
    nearby = partial(pa.fs.S3FileSystem, endpoint_override=proxy.endpoint, scheme="http")
    monkeypatch.setattr(pa.fs, "S3FileSystem", nearby)
    page = ROOT / "docs" / "source" / "streaming" / "object_stores.md"
    names: dict = {}
    for code in re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL):
        exec(compile(code, page.name, "exec"), names)
        assert names["source"].n_rows == N_ROWS


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_flat(proxy, bucket):
    growths = []
    for n_rows in (400_000, 4_000_000):
        rng = np.random.default_rng(0)
        table = pa.table({name: rng.random(n_rows, dtype="float32") for name in "abcd"})
        pq.write_table(
            table, f"bucket/{n_rows}/0.parquet", filesystem=bucket, row_group_size=n_rows
        )
        growths.append(growth_mb(f"s3://bucket/{n_rows}", buffer_size=200_000))
    assert growths[1] < growths[0] + SLACK
