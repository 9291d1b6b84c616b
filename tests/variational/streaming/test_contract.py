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
"""Every row is held to what the model demands, whichever batch it comes in."""

import contextlib
import threading

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytensor.tensor as pt
import pytest

from pytensor.compile.maker import FunctionMaker

import pymc as pm

from pymc.variational._streaming.likelihood import Factors
from pymc.variational.streaming import (
    StreamError,
    StreamingDataset,
    StreamWarning,
    check_fit,
    polish,
)

N, BATCH, LATE = 60, 10, 47


def table(**columns) -> np.ndarray:
    """Return rows whose columns are 1, but for one value of each late in the table."""
    rows = np.ones((N, 4))
    for name, value in columns.items():
        rows[LATE, "xguy".index(name)] = value
    return rows


def read_all(ds: StreamingDataset) -> None:
    """Hold all rows to the model."""
    callback = ds.fit_callback()
    while callback and ds.rows_seen < ds.total_size:
        ds.advance()


def effect(buf):
    return pm.Normal("b") * buf[:, 0]


def counts(observe):
    return lambda buf: pm.Poisson("y", pt.exp(effect(buf)), observed=observe(buf), total_size=N)


def groups(index, shape=3):
    return lambda buf: pm.Normal(
        "y", pm.Normal("a", shape=shape)[index(buf)], observed=buf[:, 0], total_size=N
    )


def matrix(buf):
    index = pt.set_subtensor(pt.zeros_like(buf)[:, 1], buf[:, 2])[:, 1].astype("int64")
    pm.Normal("y", pm.Normal("a", shape=3)[index], observed=buf[:, 0], total_size=N)


def one_hot(buf):
    rows, index = pt.arange(buf.shape[0]), buf[:, 1].astype("int64")
    dummies = pt.set_subtensor(pt.zeros((buf.shape[0], 3))[rows, index], 1.0)
    pm.Normal("y", dummies @ pm.Normal("a", shape=3), observed=buf[:, 0], total_size=N)


def whole(buf):
    return buf[:, 1].astype("int64")


FRACTION = "which the model casts to int"
BROKEN = {
    "fraction of a count": (counts(lambda buf: buf[:, 3]), {"y": 2.5}, FRACTION),
    "category that is nearly whole": (
        lambda buf: pm.Categorical(
            "y", pm.Dirichlet("p", np.ones(3)), observed=buf[:, 3], total_size=N
        ),
        {"y": 1.999999},
        FRACTION,
    ),
    "fraction of one of several counts": (
        lambda buf: pm.Multinomial(
            "y", 3, pm.Dirichlet("p", np.ones(3)), observed=buf[:, 1:4], total_size=N
        ),
        {"u": 1.5},
        FRACTION,
    ),
    "fraction of an index": (groups(whole), {"g": 1.5}, FRACTION),
    "fraction of an index from one": (
        groups(lambda buf: (buf[:, 1] - 1).astype("int64")),
        {"g": 1.5},
        FRACTION,
    ),
    "number beyond the integers": (
        counts(lambda buf: buf[:, 3].astype("uint8").astype("int64")),
        {"y": 300},
        "which the model casts to uint8",
    ),
    "index too large": (groups(whole), {"g": 3}, "axis of length 3"),
    "index too negative": (groups(whole), {"g": -4}, "axis of length 3"),
    "index of two arrays": (
        groups(lambda buf: (whole(buf), buf[:, 2].astype("int64")), (3, 2)),
        {"u": 2},
        "axis of length 2",
    ),
    "index by take": (
        lambda buf: pm.Normal(
            "y",
            pt.take(pm.Normal("a", shape=(2, 3)), whole(buf), axis=1)[0],
            observed=buf[:, 0],
            total_size=N,
        ),
        {"g": 5},
        "axis of length 3",
    ),
    "indices of each row by themselves": (
        lambda buf: pm.Normal(
            "y",
            pt.vectorize(lambda a, i: a[i].sum(), "(n),(m)->()")(
                pm.Normal("a", shape=3), buf[:, 1:3].astype("int64")
            ),
            observed=buf[:, 0],
            total_size=N,
        ),
        {"g": 3},
        "axis of length 3",
    ),
    "index after a switch": (
        groups(lambda buf: pt.switch(buf[:, 1] < 0, 0, buf[:, 1]).astype("int64")),
        {"g": 3},
        "of length 3",
    ),
    "index of an index": (
        groups(lambda buf: pt.as_tensor([0, 1, 7])[whole(buf)]),
        {"g": 2},
        "of length 3",
    ),
    "index of two columns": (
        groups(lambda buf: (2 * buf[:, 1] + buf[:, 2]).astype("int64"), 5),
        {"g": 2, "u": 2},
        "2.0 in column 'g' and 2.0 in column 'u', which indexes an axis of length 5",
    ),
    "index in a stack": (
        groups(lambda buf: pt.stack([buf[:, 2], buf[:, 1]], axis=1).astype("int64")[:, 1]),
        {"g": 3},
        "of length 3",
    ),
    "index that was set": (matrix, {"u": 3}, "3.0 in column 'u', which indexes"),
    "place of a one": (one_hot, {"g": 3}, "of length 3"),
    "index in a potential": (
        lambda buf: [
            counts(lambda buf: buf[:, 3])(buf),
            pm.Potential("p", pm.Normal("a", shape=3)[whole(buf)].sum()),
        ],
        {"g": 3},
        "of length 3",
    ),
    "negative count": (counts(lambda buf: buf[:, 3]), {"y": -1}, "outside the support of 'y'"),
    "more successes than trials": (
        lambda buf: pm.Binomial(
            "y", buf[:, 2], pm.math.invlogit(effect(buf)), observed=buf[:, 3], total_size=N
        ),
        {"y": 2},
        "1.0 in column 'u' and 2.0 in column 'y', outside the support of 'y'",
    ),
    "category that is none": (
        lambda buf: pm.Categorical(
            "y",
            logit_p=pt.outer(buf[:, 0], pm.Normal("b", shape=3)),
            observed=buf[:, 3],
            total_size=N,
        ),
        {"y": 3},
        "outside the support of 'y'",
    ),
    "negative amount": (
        lambda buf: pm.Gamma("y", 2, pt.exp(effect(buf)), observed=buf[:, 3], total_size=N),
        {"y": -0.5},
        "-0.5 in column 'y', outside the support of 'y'",
    ),
    "scale that is zero": (
        lambda buf: pm.Normal("y", effect(buf), buf[:, 2], observed=buf[:, 0], total_size=N),
        {"u": 0},
        "0.0 in column 'u', where the model needs sigma > 0",
    ),
    "probability that is none": (
        lambda buf: [
            effect(buf),
            pm.Bernoulli("y", buf[:, 1] / 2, observed=buf[:, 3], total_size=N),
        ],
        {"g": 3},
        "3.0 in column 'g', where the model needs 0 <= p <= 1",
    ),
    "beyond the bound of a censored value": (
        lambda buf: pm.Censored(
            "y", pm.Normal.dist(effect(buf)), None, 2, observed=buf[:, 3], total_size=N
        ),
        {"y": 2.5},
        "outside the support of 'y'",
    ),
}


@pytest.mark.filterwarnings("ignore:the Potential:UserWarning")
@pytest.mark.parametrize("build, late, message", BROKEN.values(), ids=BROKEN)
def test_a_row_of_a_late_batch_is_refused(build, late, message):
    pa = pytest.importorskip("pyarrow")
    rows = pa.table(dict(zip("xguy", table(**late).T)))
    with StreamingDataset(rows, batch_size=BATCH, order_check="off") as ds, pm.Model():
        build(ds.as_tensor())
        with pytest.raises(StreamError, match=f"row {LATE} of the stream holds .*{message}"):
            read_all(ds)


@pytest.mark.parametrize("late", [5_015, 99_990], ids=["computed", "compiled"])
@pytest.mark.parametrize(
    "bad, what",
    [({"group": 4}, "index"), ({"count": 4}, "support"), ({"group": 1e12}, "index")],
    ids=["index", "count", "far index"],
)
def test_conditions_on_several_columns_are_those_of_each_row(late, bad, what):
    """Those on a group that is looked up, and on counts among trials, are in no interval."""
    rng = np.random.default_rng(0)
    n = 100_000
    trials = rng.integers(0, 4, n)
    columns = {
        "group": rng.integers(0, 4, n),
        "trials": trials,
        "count": rng.integers(0, trials + 1),
    }
    rows = np.column_stack(list(columns.values())).astype(float)
    for name, value in bad.items():
        rows[late, list(columns).index(name)] = value
    with StreamingDataset(rows, batch_size=5_000, order_check="off") as ds, pm.Model():
        buf = ds.as_tensor()
        index = pt.as_tensor([3, 2, 1, 0])[(2 * buf[:, 0] - buf[:, 0]).astype("int64")]
        logit = pm.Normal("a", shape=4)[index]
        pm.Binomial("y", buf[:, 1], logit_p=logit, observed=buf[:, 2], total_size=n)
        with pytest.raises(StreamError, match=rf"row {late} of the stream holds .*{what}"):
            read_all(ds)


def test_nothing_is_compiled_in_the_thread_that_reads_ahead(monkeypatch):
    """PyTensor's mode could stay that of what another thread compiled meanwhile."""
    threads = []
    make = FunctionMaker.__init__

    def noting(*args, **kwargs):
        threads.append(threading.current_thread())
        make(*args, **kwargs)

    monkeypatch.setattr(FunctionMaker, "__init__", noting)
    block = np.random.default_rng(0).integers(0, 4, (5_000, 2)).astype(float)
    ds = StreamingDataset(lambda: iter([block] * 20), batch_size=5_000, total_size=100_000)
    with ds, pm.Model():
        buf = ds.as_tensor()
        index = (2 * buf[:, 0] - buf[:, 0]).astype("int64")
        mu = pm.Normal("a", shape=4)[pt.as_tensor([3, 2, 1, 0])[index]]
        pm.Normal("y", mu, observed=buf[:, 1], total_size=100_000)
        read_all(ds)
        assert ds._reader._examiner.contract._compiled is not None
    assert set(threads) == {threading.main_thread()}


REPAIRED = {
    "rounded": (counts(lambda buf: pt.floor(buf[:, 3])), {"y": 2.5}),
    "scaled": (counts(lambda buf: (2 * buf[:, 3]).astype("int64")), {"y": 2.5}),
    "longer axis": (groups(whole, 4), {"g": 3}),
    "clipped": (groups(lambda buf: pt.clip(buf[:, 1], 0, 2).astype("int64")), {"g": 7}),
    "from the end": (groups(whole), {"g": -3}),
    "scale in rows that were kept": (BROKEN["scale that is zero"][0], {"u": 0.1}),
    "amount in rows that were kept": (BROKEN["negative amount"][0], {"y": 0.5}),
    "column that is not read": (groups(whole), {"u": 0.5, "y": -7}),
}


@pytest.mark.parametrize("build, late", REPAIRED.values(), ids=REPAIRED)
def test_what_the_messages_advise_is_accepted(build, late):
    with StreamingDataset(table(**late), batch_size=BATCH, order_check="off") as ds, pm.Model():
        build(ds.as_tensor())
        read_all(ds)


def test_a_repaired_model_goes_on_with_the_same_stream():
    """A notebook makes the model anew, and not the dataset."""
    with StreamingDataset(table(g=3), batch_size=BATCH, order_check="off") as ds:
        with pm.Model():
            groups(whole)(ds.as_tensor())
            with pytest.raises(StreamError, match=f"row {LATE} .* axis of length 3"):
                read_all(ds)
        ds.fit_callback()  # for a model that is met at the first step
        with pm.Model():
            groups(whole, 4)(ds.as_tensor())
            read_all(ds)


def test_a_row_of_the_batch_with_which_a_model_is_met_has_its_number():
    with StreamingDataset(table(g=3), batch_size=BATCH, order_check="off") as ds:
        while ds.rows_seen + BATCH <= LATE:
            ds.advance()
        with pm.Model():
            groups(whole)(ds.as_tensor())
            with pytest.raises(StreamError, match=f"row {LATE} of the stream holds 3.0"):
                ds.fit_callback()


def test_a_loop_of_ones_own_in_the_context_of_a_model_is_held_to_it():
    with StreamingDataset(table(g=3), batch_size=BATCH, order_check="off") as ds, pm.Model():
        groups(whole)(ds.as_tensor())
        with pytest.raises(StreamError, match=f"row {LATE} of the stream holds 3.0"):
            while ds.rows_seen < N:
                ds.advance()


def test_a_model_that_is_met_at_the_first_step_is_held_to_it_too():
    with StreamingDataset(table(g=3), batch_size=BATCH, order_check="off") as ds:
        callback = ds.fit_callback()
        with pm.Model():
            groups(whole)(ds.as_tensor())
            options = {"progressbar": False, "compile_kwargs": {"mode": "FAST_COMPILE"}}
            with pytest.raises(StreamError, match=f"row {LATE} of the stream holds 3.0"):
                pm.fit(20, callbacks=[callback], **options)


@pytest.mark.parametrize("dtype", ["float16", ">f8", "uint8", "longdouble"])
def test_rows_of_any_type_are_held_to_it(dtype):
    rows = table(g=3).astype(dtype)
    with StreamingDataset(rows, batch_size=BATCH, order_check="off") as ds, pm.Model():
        groups(whole)(ds.as_tensor())
        with pytest.raises(StreamError, match=f"row {LATE} of the stream holds 3"):
            read_all(ds)


@pytest.mark.parametrize("late", [5, 25, 45])
@pytest.mark.parametrize("prefetch", [False, True])
def test_rows_that_were_read_before_the_model_was_known_are_held_to_it(late, prefetch):
    """The thread has read some chunks by then, and compares the others itself."""
    rows = np.ones((N, 4))
    rows[late, 1] = 7
    chunks = [rows[i : i + BATCH] for i in range(0, N, BATCH)]
    with StreamingDataset(chunks, batch_size=5, order_check="off", prefetch=prefetch) as ds:
        callback = ds.fit_callback()
        while ds.rows_seen < late - 5:
            ds._advance()
        for shape in (9, 3):  # the second model refuses what the first one takes
            with pm.Model() as model:
                groups(whole, shape)(ds.as_tensor())
            if ds.rows_seen + 5 <= late:
                callback.check(Factors(model))
        with pytest.raises(StreamError, match=f"row {late} of the stream holds 7.0"):
            callback.check(Factors(model))
            ds._advance()
            ds._advance()


def test_rows_of_ones_own_are_held_to_the_indices_of_the_model():
    with StreamingDataset(table(), batch_size=BATCH, order_check="off") as ds, pm.Model():
        groups(whole)(ds.as_tensor())
        counts(lambda buf: buf[:, 3])
        callback = ds.fit_callback()
        with pytest.raises(StreamError, match=r"row 47 of the stream holds 3\.0"):
            ds.rows(table(g=3))
        with ds.rows(table(y=-1)):  # where the observed value is not known yet
            pass
        del callback


@pytest.mark.parametrize("run, thread", [(check_fit, True), (polish, False)])
def test_passes_over_all_rows_are_held_to_the_indices_too(run, thread):
    with StreamingDataset(table(g=3), batch_size=BATCH, order_check="off") as ds, pm.Model():
        groups(whole)(ds.as_tensor())
        approx = pm.MeanField()
    options = {"progressbar": False}
    with ThreadPoolExecutor(1) as executor:
        if thread:
            options["executor"] = executor
        with pytest.raises(StreamError, match=f"row {LATE} of the stream holds 3.0"):
            run(approx, ds, **options)


def test_rows_of_ones_own_leave_the_stream_held_to_the_support():
    rows = np.repeat([1.0, -1.0], 20)[:, None]
    with StreamingDataset(rows, batch_size=10, order_check="off") as ds:
        with pm.Model():
            rate = pm.HalfNormal("rate")
            pm.Gamma("y", 2, rate, observed=ds.as_tensor()[:, 0], total_size=ds.total_size)
            callback = ds.fit_callback()
        with ds.rows(
            np.array([[-5.0]])
        ):  # the value of the observed column makes no difference there
            pass
        assert ds.advance() and ds.advance()
        with pytest.raises(StreamError, match=r"row 20 .* -1.0 in column .* support of 'y'"):
            ds.advance()
        del callback


def fit_a_row_of_a_negative_scale(scale, *, warns):
    """Fit a model with a row whose scale is -1, which *scale* may or may not make right."""
    with StreamingDataset(table(u=-1), batch_size=BATCH, order_check="off") as ds, pm.Model():
        buf, s = ds.as_tensor(), pm.HalfNormal("s")
        pm.Normal("y", pm.Normal("b"), s * scale(buf[:, 2]), observed=buf[:, 0], total_size=N)
        options = {"progressbar": False, "compile_kwargs": {"mode": "FAST_COMPILE"}}
        with pytest.warns(StreamWarning, match=warns) if warns else contextlib.nullcontext():
            pm.fit(20, callbacks=[ds.fit_callback()], **options)


def test_a_row_that_makes_the_loss_infinite_is_told_of_once_and_may_be_repaired():
    """What parameters and rows give together is not derived from the graph."""
    fit_a_row_of_a_negative_scale(
        lambda u: u, warns=f"step 5 .*row {LATE} .* no finite log-likelihood.* 0: 1, 2: -1"
    )
    fit_a_row_of_a_negative_scale(pt.abs, warns=None)
