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
"""Models that would be fitted wrongly in minibatches are refused, others are not."""

import warnings

import numpy as np
import pytensor
import pytensor.tensor as pt
import pytest

from pytensor.tensor.basic import AllocEmpty

import pymc as pm

from pymc.variational.streaming import StreamError, StreamingDataset, StreamWarning
from tests.variational.streaming.tell_tale import QUICK


@pytest.fixture
def ds():
    rng = np.random.default_rng(0)
    rows = np.column_stack(
        [rng.normal(size=(60, 3)), rng.integers(0, 2, 60), rng.integers(0, 5, 60), np.zeros(60)]
    )
    rows[:12, 0] = np.sort(rows[:12, 0])  # the largest of the first batch is in an odd row
    with StreamingDataset(rows, batch_size=12, order_check="off") as ds:
        yield ds


def linear(buf):
    return pm.Normal("b", 0, 1) * buf[:, 0]


REFUSED = {
    "unused stream": (
        lambda buf, n: pm.Normal("y", pm.Normal("b"), observed=np.zeros(12)),
        "no observed variable of the model depends on the stream 'stream'; build .* "
        "if another model is fitted, call fit_callback",
    ),
    "no total_size": (
        lambda buf, n: pm.Normal("y", linear(buf), observed=buf[:, 1]),
        "'y' depends on the stream but has no total_size, .* pass total_size=60",
    ),
    "no total_size, only the mean streams": (
        lambda buf, n: pm.Normal("y", linear(buf), observed=np.zeros(12)),
        "'y' depends on the stream but has no total_size",
    ),
    "another total_size": (
        lambda buf, n: pm.Normal("y", linear(buf), observed=buf[:, 1], total_size=61),
        "'y' depends on the stream but has total_size=61; pass total_size=60",
    ),
    "total_size that differs from another axis": (
        lambda buf, n: pm.Normal("y", buf[:, :2], observed=buf[:, 1:3], total_size=(n, 4)),
        r"'y' depends on the stream but has total_size=\[60, 4\]",
    ),
    "latent variable per row": (
        lambda buf, n: pm.Normal(
            "y", pm.Normal("z", buf[:, 0], shape=12), observed=buf[:, 1], total_size=n
        ),
        "'z' is not observed but its prior depends on the stream",
    ),
    "parameter per row of the batch": (
        lambda buf, n: pm.Normal(
            "y", pm.Normal("z", 0, 1, shape=12), observed=buf[:, 1], total_size=n
        ),
        "'z' has one latent value for each row of a batch, .* integrate it out",
    ),
    "parameter per row of the batch by its dims": (
        lambda buf, n: pm.Normal(
            "y", pm.Normal("z", dims="row"), observed=buf[:, 1], total_size=n, dims="row"
        ),
        "'z' has one latent value for each row of a batch, .* integrate it out",
    ),
    "transposed": (
        lambda buf, n: pm.Normal("y", 0, 1, observed=buf[:, :3].T, total_size=n),
        r"'y' has shape \(3, 12\); streaming needs one term per row .* the 12 rows",
    ),
    "centred": (
        lambda buf, n: pm.Normal("y", 0, 1, observed=buf[:, 0] - buf[:, 0].mean(), total_size=n),
        "'y' ties the rows of a batch together",
    ),
    "standardised regressor": (
        lambda buf, n: pm.Normal(
            "y", linear((buf - buf.mean(0)) / buf.std(0)), observed=buf[:, 1], total_size=n
        ),
        "'y' ties the rows of a batch together",
    ),
    "standardised dummy that the first batch does not have": (
        lambda buf, n: pm.Normal(
            "y",
            linear((buf[:, 5:] - buf[:, 5:].mean(0)) / (buf[:, 5:].std(0) + 1e-6)),
            observed=buf[:, 1],
            total_size=n,
        ),
        "'y' ties the rows of a batch together",
    ),
    "missing values that are left out, beside an index": (
        lambda buf, n: pm.Normal(
            "y",
            pm.Normal("g", shape=5)[buf[:, 4].astype("int64")][buf[:, 0] < 900],
            observed=buf[:, 0][buf[:, 0] < 900],
            total_size=n,
        ),
        "'y' ties the rows of a batch together: AdvancedSubtensor",
    ),
    "autoregressive": (
        lambda buf, n: pm.Normal(
            "y",
            pm.Normal("b") * pt.concatenate([[0.0], buf[:-1, 0]]),
            observed=buf[:, 0],
            total_size=n,
        ),
        "'y' ties the rows of a batch together",
    ),
    "random walk": (
        lambda buf, n: pm.GaussianRandomWalk(
            "y", 0, 1, init_dist=pm.Normal.dist(), observed=buf[:, 0], total_size=n
        ),
        "'y'",
    ),
    "scaled by the length of a batch": (
        lambda buf, n: pm.CustomDist(
            "y",
            pm.Normal("b"),
            logp=lambda y, b: pm.logp(pm.Normal.dist(b), y) * (n / y.shape[0]),
            observed=buf[:, 1],
            total_size=n,
        ),
        "'y' depends on the number of rows in the batch; leave that number out",
    ),
    "a small effect of the length of a batch": (
        lambda buf, n: pm.Normal("y", linear(buf) / buf.shape[0], observed=buf[:, 1], total_size=n),
        "'y' depends on the number of rows in the batch; leave that number out",
    ),
    "centred, where no probability is within its bounds at first": (
        lambda buf, n: pm.Bernoulli(
            "y",
            pm.Normal("a") - 0.05 + 0.001 * (buf[:, 0] - buf[:, 0].mean()),
            observed=buf[:, 3],
            total_size=n,
        ),
        "'y' ties the rows of a batch together",
    ),
}

_LATENT = "'z' has one latent value for each row of a batch, .* integrate it out"
RARE = {
    "a code that is imputed": (
        lambda buf, b, z: pt.switch(pt.eq(buf[:, 0], -999), z, buf[:, 0]),
        _LATENT,
    ),
    "a group that is imputed": (
        lambda buf, b, z: pt.as_tensor([0.0, 0, 0, 0, 0, 1])[buf[:, 4].astype("int64")] * z,
        _LATENT,
    ),
    "the place in the batch": (
        lambda buf, b, z: b * pt.switch(buf[:, 0] > 90, pt.arange(buf.shape[0]), 0),
        "'y' ties .* a value for each place in the batch is used",
    ),
    "weights by place": (
        lambda buf, b, z: b * pt.maximum(buf[:, 0] - 90, 0) * np.arange(12.0),
        "'y' ties .* a value for each place in the batch is used",
    ),
    "places that few batches have": (
        lambda buf, b, z: b * pt.switch(pt.arange(buf.shape[0]) < 10, buf[:, 0], 0),
        "'y' ties .* a value for each place in the batch is used",
    ),
    "weights of places that few batches have": (
        lambda buf, b, z: b * buf[:, 0] * pt.repeat([1.0, 0], [10, 90])[: buf.shape[0]],
        "'y' ties .* a value for each place in the batch is used",
    ),
    "the first ten places": (
        lambda buf, b, z: b * pt.set_subtensor(buf[:, 0][:10], 0),
        "'y' ties .* SetSubtensor.* does not keep the rows apart",
    ),
    "the number of rare rows": (
        lambda buf, b, z: b * (buf[:, 0] > 90) * (buf[:, 0] > 90).sum(),
        "'y' ties .* Sum.* does not keep the rows apart",
    ),
    "pairs of rows": (
        lambda buf, b, z: b * pt.eq(buf[:, 4][:, None], buf[:, 4][None, :]).all(axis=1),
        "'y' ties .* each row is combined with the others",
    ),
}


@pytest.mark.parametrize("mean, message", RARE.values(), ids=RARE)
def test_ties_through_values_that_no_row_has_are_refused(ds, mean, message):
    with pm.Model():
        buf, b = ds.as_tensor(), pm.Normal("b")
        z = pm.Normal("z", shape=12) if message is _LATENT else None
        pm.Normal("y", mean(buf, b, z), 1, observed=buf[:, 1], total_size=60)
        with pytest.raises(StreamError, match=message):
            ds.fit_callback()


ACCEPTED = {
    "named axes": lambda buf, n: pm.Normal("y", 0, 1, observed=buf[:, :3], total_size=(n, None)),
    "scale that is linear": lambda buf, n: pm.Normal(
        "y", 0, 0.01 + linear(buf), observed=buf[:, 1], total_size=n
    ),
    "saturated": lambda buf, n: pm.Bernoulli(
        "y",
        pm.math.invlogit(1e4 * buf[:, :3] @ pm.Normal("b", shape=3)),
        observed=buf[:, 3],
        total_size=n,
    ),
    "deterministic beside it": lambda buf, n: pm.Normal(
        "y", pm.Deterministic("mu", linear(buf)), observed=buf[:, 1], total_size=n
    ),
    "other data beside it": lambda buf, n: [
        pm.Normal("y", linear(buf), observed=buf[:, 1], total_size=n),
        pm.Normal("z", 0, 1, observed=np.zeros(3)),
    ],
}


@pytest.mark.parametrize("build, message", REFUSED.values(), ids=REFUSED)
def test_wrong_models_are_refused_before_the_first_step(ds, build, message):
    with pm.Model(coords={"row": range(12)}):
        build(ds.as_tensor(), ds.total_size)
        with pytest.raises(StreamError, match=message):
            ds.fit_callback()
    assert ds.as_tensor().get_value().shape == (0, 6)


@pytest.mark.parametrize("build", ACCEPTED.values(), ids=ACCEPTED)
def test_right_models_are_accepted_and_the_batch_is_left_alone(ds, build):
    with pm.Model():
        build(ds.as_tensor(), ds.total_size)
        callback = ds.fit_callback()
        np.testing.assert_array_equal(ds.as_tensor().get_value(), next(iter(ds)))
        del callback


def test_a_scan_along_the_columns_is_accepted_whatever_was_in_memory(ds, monkeypatch):
    def leave_what_was_in_memory(op, node, shape, outputs):
        outputs[0][0] = np.random.default_rng(0).normal(size=shape)

    monkeypatch.setattr(AllocEmpty, "perform", leave_what_was_in_memory)
    with pm.Model(), pytensor.config.change_flags(cxx=""):
        buf = ds.as_tensor()
        state = pytensor.scan(
            lambda x, state: pt.tanh(x + state),
            sequences=[buf[:, :3].T],
            outputs_info=[pt.zeros_like(buf[:, 0])],
            return_updates=False,
        )
        pm.Normal("y", pm.Normal("b") * state[-1], observed=buf[:, 1], total_size=60)
        ds.fit_callback()


def test_a_variable_that_pm_observe_made_is_given_its_total_size_where_it_is_written(ds):
    def model(**kwargs):
        with pm.Model() as model:
            pm.Normal("y", linear(ds.as_tensor()), 1, **kwargs)
        return model

    rows = ds.as_tensor()[:, 1]
    with pm.observe(model(), {"y": rows}):
        with pytest.raises(StreamError, match=r"pass total_size=60, .* together with observed="):
            ds.fit_callback()
    with model(observed=rows, total_size=60):
        ds.fit_callback()


def test_a_likelihood_of_pymc_dims_is_written_with_pm(ds):
    pmd = pytest.importorskip("pymc.dims")
    with pm.Model(coords={"group": range(5), "row": range(12)}):
        x, y = (pmd.as_xtensor(ds.as_tensor()[:, i], dims=("row",)) for i in (0, 1))
        mean = pmd.Normal("b", dims="group").sum("group") * x
        pmd.Normal("y", mean, 1, observed=y)
        with pytest.raises(StreamError, match=r"write it with pm instead of pymc\.dims"):
            ds.fit_callback()
    with pm.Model(coords={"group": range(5)}):
        mean = pmd.Normal("b", dims="group").sum("group") * x
        pm.Normal("y", mean.values, 1, observed=ds.as_tensor()[:, 1], total_size=60)
        ds.fit_callback()


def test_a_marginalised_latent_is_written_as_a_mixture(ds):
    pmx = pytest.importorskip("pymc_extras")
    with pm.Model() as model:
        z = pm.Bernoulli("z", 0.5, shape=12)
        pm.Normal("y", pm.Normal("m", shape=2)[z], 1, observed=ds.as_tensor()[:, 0], total_size=60)
    with pmx.marginalize(model, ["z"]), pytest.raises(StreamError, match=r"as a pm\.Mixture"):
        ds.fit_callback()


def test_a_nested_model_is_checked_with_the_variables_around_it(ds):
    with pm.Model() as parent:
        b = pm.Normal("b")
        with pm.Model(name="child"):
            pm.Normal("y", b, 1, observed=ds.as_tensor()[:, 1], total_size=60)
            callback = ds.fit_callback()
        pm.fit(2, callbacks=[callback], **QUICK)
    assert [rv.name for rv in parent.observed_RVs] == ["child::y"]


def test_a_variable_of_another_model_is_refused(ds):
    with pm.Model():
        b = pm.Normal("b")
    with pm.Model():
        pm.Normal("y", b, 1, observed=ds.as_tensor()[:, 1], total_size=60)
        with pytest.raises(StreamError, match="variables that are not in this model; call fit_c"):
            ds.fit_callback()


def test_a_stream_is_observed_by_its_buffer(ds):
    with pm.Model():
        with pytest.raises(TypeError, match=r"no array; pass a slice of ds\.as_tensor\(\)"):
            pm.Normal("y", pm.Normal("b"), observed=ds, total_size=60)
    with pm.Model():
        pm.Normal("y", pm.Normal("b"), observed=ds.as_tensor()[:, 1], total_size=60)
        ds.fit_callback()


def test_dims_of_all_rows_are_left_out(ds):
    def model(**kwargs):
        with pm.Model(coords={"row": range(60)}) as model:
            pm.Normal("y", pm.Normal("b"), observed=ds.as_tensor()[:, 1], total_size=60, **kwargs)
        return model

    with model(dims="row"), pytest.raises(StreamError, match=r"leave out what has another length"):
        ds.fit_callback()
    with model():
        ds.fit_callback()


def test_a_stream_in_more_replacements_is_refused(ds):
    with pm.Model():
        data = pm.Data("data", np.zeros(12))
        pm.Normal("y", pm.Normal("b"), observed=data, total_size=60)
        callback = ds.fit_callback
        with pytest.raises(StreamError, match="build the likelihood from as_tensor"):
            pm.fit(2, more_replacements={data: ds.as_tensor()[:, 1]}, callbacks=[callback()])


def test_a_potential_over_the_stream_is_warned_of(ds):
    with pm.Model():
        b = pm.Normal("b")
        pm.Potential("y", pm.logp(pm.Normal.dist(b), ds.as_tensor()[:, 0]).sum())
        with pytest.warns(StreamWarning, match="Potential 'y' depends on the stream 'stream'"):
            ds.fit_callback()


def test_an_unscaled_stream_wants_an_unscaled_likelihood():
    with pytest.warns(StreamWarning):
        ds = StreamingDataset(np.zeros((9, 1)), batch_size=3, total_size=None)
    with pm.Model():
        pm.Normal("y", pm.Normal("b"), observed=ds.as_tensor()[:, 0], total_size=9)
        with pytest.raises(StreamError, match="has total_size=9; pass total_size=None"):
            ds.fit_callback()


def test_what_is_added_after_the_callback_is_checked_at_its_first_call(ds):
    with pm.Model():
        b = pm.Normal("b")
        pm.Normal("y", b, observed=ds.as_tensor()[:, 0], total_size=60)
        callback = ds.fit_callback()
        pm.Normal("z", b, observed=ds.as_tensor()[:, 1])
        with pytest.raises(StreamError, match="'z' depends on the stream but has no total_size"):
            pm.fit(1, callbacks=[callback], **QUICK)


@pytest.mark.parametrize("n_steps", [0, 2], ids=["first call", "refine"])
def test_data_that_change_are_checked_at_the_next_step(ds, n_steps):
    with pm.Model():
        offset = pm.Data("offset", np.zeros(12))
        mean = pm.Normal("b") + offset
        pm.Normal("y", mean, observed=ds.as_tensor()[:, 0], total_size=60)
        inference = pm.ADVI()
        inference.fit(n_steps, callbacks=[ds.fit_callback()], **QUICK)
        pm.set_data({"offset": np.arange(12.0)})
        with pytest.raises(StreamError, match=r"'y' ties .* a value for each place"):
            inference.refine(2, progressbar=False)


def test_columns_of_two_streams_in_one_likelihood_come_from_one_source(ds):
    with StreamingDataset(np.zeros((60, 1)), batch_size=12, name="other") as other, pm.Model():
        x, y = other.as_tensor()[:, 0], ds.as_tensor()[:, 0]
        pm.Normal("y", pm.Normal("b") * x, observed=y, total_size=60)
        with pytest.raises(StreamError, match=r"'stream' and 'other', .* one source"):
            ds.fit_callback()
    with StreamingDataset(np.zeros((60, 2)), batch_size=12) as both, pm.Model():
        x, y = both.as_tensor()[:, 0], both.as_tensor()[:, 1]
        pm.Normal("y", pm.Normal("b") * x, observed=y, total_size=60)
        both.fit_callback()


def test_a_loop_of_ones_own_in_the_context_of_a_model_checks_it(ds):
    with pm.Model():
        pm.Normal("x")
        assert ds.advance()  # of a model that does not use the stream
    ds.close()
    with pm.Model():
        pm.Normal("y", pm.Normal("b"), observed=ds.as_tensor()[:, 0])
        with pytest.raises(StreamError, match="'y' depends on the stream but has no total_size"):
            ds.advance()


def test_a_model_that_has_not_changed_is_checked_once(ds, monkeypatch):
    checked = []
    monkeypatch.setattr(
        "pymc.variational._streaming.callback.check_model", lambda *args: checked.append(args)
    )
    with pm.Model():
        pm.Normal("y", pm.Normal("b"), observed=ds.as_tensor()[:, 0], total_size=60)
        pm.fit(2, callbacks=[ds.fit_callback()], **QUICK)
    assert len(checked) == 1


def test_a_batch_of_one_row_is_accepted():
    with StreamingDataset(np.ones((9, 1)), batch_size=1) as ds, pm.Model():
        pm.Normal("y", pm.Normal("b"), observed=ds.as_tensor()[:, 0], total_size=9)
        with warnings.catch_warnings(action="error"):
            ds.fit_callback()


def test_what_a_batch_of_one_row_does_not_show_is_refused_too():
    build, message = REFUSED["scaled by the length of a batch"]
    with StreamingDataset(np.ones((9, 2)), batch_size=1) as ds, pm.Model():
        build(ds.as_tensor(), ds.total_size)
        with pytest.raises(StreamError, match=message):
            ds.fit_callback()


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_buffers_of_other_types_are_checked(dtype):
    rows = np.arange(60).reshape(30, 2) % 7
    with StreamingDataset(rows, batch_size=10, dtype=dtype) as ds, pm.Model():
        x, y = ds.as_tensor()[:, 0], ds.as_tensor()[:, 1]
        pm.Normal("y", pm.Normal("b") * x, observed=y.astype("float64"), total_size=30)
        ds.fit_callback()
        pm.Normal("z", x.max() - x, observed=y.astype("float64"), total_size=30)
        with pytest.raises(StreamError, match="'z' ties the rows"):
            ds.fit_callback()
