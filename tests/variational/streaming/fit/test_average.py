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

import warnings

import numpy as np
import pytest

from hypothesis import given
from hypothesis import strategies as st

import pymc as pm

from pymc.variational._streaming.fit.bins import Bins, merge
from pymc.variational.callbacks import Tracker
from pymc.variational.streaming import EpochAverage, StreamError, StreamingDataset, StreamWarning

ROWS = np.arange(10.0)[:, None]
BATCH_SIZE = 4
QUICK = {"compile_kwargs": {"mode": "FAST_COMPILE"}, "progressbar": False}


def normal_model(ds: StreamingDataset) -> pm.Model:
    with pm.Model() as model:
        mu = pm.Normal("mu", 0, 1, shape=2)
        pm.Normal("y", mu.sum(), 1, observed=ds.as_tensor()[:, 0], total_size=ds.total_size)
    return model


@pytest.fixture
def ds():
    """Open a stream at its first batch."""
    with StreamingDataset(ROWS, batch_size=BATCH_SIZE) as ds:
        ds.advance()
        yield ds


@pytest.fixture(scope="module")
def approx() -> pm.MeanField:
    """Return an approximation whose means the tests set."""
    with normal_model(StreamingDataset(ROWS, batch_size=BATCH_SIZE)):
        return pm.MeanField()


def mean_of(approx) -> np.ndarray:
    return approx.groups[0].shared_params["mu"].get_value()


def iterates(n: int) -> np.ndarray:
    """Return means that scatter and go nowhere."""
    side = np.where(np.arange(n) % 2, 1.0, -1.0)
    return side[:, None] * np.random.default_rng(0).uniform(0.5, 1, size=(n, 2))


def epoch_of_step(n_steps: int) -> np.ndarray:
    return np.arange(n_steps) * BATCH_SIZE // len(ROWS)


def walk(average, approx, ds, means, *, last: bool = False, first_step: int = 1) -> None:
    """Take a step to each of the means, with `average` before or after the fit callback."""
    if not len(ds.as_tensor().get_value()):
        ds.advance()
    for i, mean in enumerate(means, first_step):
        approx.groups[0].shared_params["mu"].set_value(mean)
        if last:
            ds.advance()
            average(approx, None, i)
        else:
            average(approx, None, i)
            ds.advance()


class TestWholeEpochs:
    @pytest.mark.parametrize("n_steps", [10, 25, 26])
    @pytest.mark.parametrize("burn_in", [0, 0.7])
    def test_steps_count_to_the_epoch_in_which_their_batch_begins(
        self, ds, approx, n_steps, burn_in
    ):
        """An epoch is 2.5 batches, so that epochs take three steps and two in turn."""
        means = iterates(n_steps)
        average = EpochAverage(ds, burn_in=burn_in)
        walk(average, approx, ds, means)
        average.apply(approx)
        epoch = epoch_of_step(n_steps)
        whole = n_steps * BATCH_SIZE // len(ROWS)
        kept = range(int(np.ceil(burn_in * whole)), whole)
        assert average.epochs == len(kept)
        expected = np.mean([means[epoch == number].mean(0) for number in kept], axis=0)
        np.testing.assert_allclose(mean_of(approx), expected)

    def test_after_the_fit_callback_steps_count_to_the_epoch_of_the_next_batch(self, ds, approx):
        """The first epoch then lacks its first batch."""
        means = iterates(25)
        average = EpochAverage(ds, burn_in=0)
        walk(average, approx, ds, means, last=True)
        average.apply(approx)
        assert average.epochs == 9
        epoch = epoch_of_step(26)[1:]
        expected = np.mean([means[epoch == number].mean(0) for number in range(1, 10)], axis=0)
        np.testing.assert_allclose(mean_of(approx), expected)

    def test_the_last_epoch_counts_where_no_epoch_begins_after_the_burn_in(self, ds, approx):
        means = iterates(8)
        average = EpochAverage(ds, burn_in=0.9)
        walk(average, approx, ds, means)
        average.apply(approx)
        assert average.epochs == 1
        np.testing.assert_allclose(mean_of(approx), means[epoch_of_step(8) == 2].mean(0))

    def test_it_goes_on_through_refine(self, ds, approx):
        means = iterates(20)
        average = EpochAverage(ds)
        walk(average, approx, ds, means[:9])
        average.apply(approx)
        walk(average, approx, ds, means[9:], first_step=9)
        average.apply(approx)
        epoch = epoch_of_step(20)
        expected = np.mean([means[epoch == number].mean(0) for number in range(4, 8)], axis=0)
        np.testing.assert_allclose(mean_of(approx), expected)

    def test_another_fit_starts_another_average(self, ds, approx):
        average = EpochAverage(ds, burn_in=0)
        walk(average, approx, ds, iterates(10) + 100)
        means = iterates(10)
        walk(average, approx, ds, means)
        average.apply(approx)
        assert average.epochs == 3
        assert np.abs(mean_of(approx)).max() < 10

    def test_the_part_of_an_epoch_after_a_resume_is_no_whole_epoch(self, ds, approx):
        ds.load_state_dict({**ds.state_dict(), "offset": 4, "rows_seen": 4})
        ds.advance()
        means = iterates(9)
        average = EpochAverage(ds, burn_in=0)
        walk(average, approx, ds, means)
        average.apply(approx)
        assert average.epochs == 3
        epoch = epoch_of_step(10)[1:]
        expected = np.mean([means[epoch == number].mean(0) for number in (1, 2, 3)], axis=0)
        np.testing.assert_allclose(mean_of(approx), expected)

    @pytest.mark.parametrize("stop", [1, 8, 70])
    def test_it_goes_on_from_its_state(self, ds, approx, stop):
        """Before the end of the first epoch, after some, and after bins were merged."""
        means = iterates(100)
        whole = EpochAverage(ds, burn_in=0.2)
        walk(whole, approx, ds, means[:stop])
        resumed = EpochAverage(ds, burn_in=0.2)
        resumed.load_state_dict(whole.state_dict())
        for i, mean in enumerate(means[stop:], stop + 1):
            approx.groups[0].shared_params["mu"].set_value(mean)
            whole(approx, None, i)
            resumed(approx, None, i)
            ds.advance()
        assert resumed.epochs == whole.epochs > 20
        assert resumed.state_dict().keys() == whole.state_dict().keys()
        for name, expected in whole.state_dict().items():
            np.testing.assert_array_equal(resumed.state_dict()[name], expected, err_msg=name)

    def test_it_averages_what_a_fit_of_an_epoch_passed_through(self):
        """A source that ends with a full batch, after which no callback is called."""
        ds = StreamingDataset(ROWS, batch_size=5, cycle=False)
        track = Tracker(mean=lambda approx, losses, i: mean_of(approx))
        with normal_model(ds), pytest.warns(StreamWarning, match="the source ended"):
            average = EpochAverage(ds, burn_in=0)
            noisy = pm.sgd(learning_rate=1e-4)
            callbacks = [track, average, ds.fit_callback()]
            approx = pm.fit(50, callbacks=callbacks, obj_optimizer=noisy, random_seed=1, **QUICK)
        _, rho = [p.get_value() for p in approx.params]
        average.apply(approx)
        assert average.epochs == 1
        np.testing.assert_allclose(mean_of(approx), np.mean(track["mean"], axis=0))
        np.testing.assert_array_equal(approx.params[1].get_value(), rho)


class TestWarnings:
    def test_less_than_a_whole_epoch_is_averaged_by_steps(self, approx):
        with StreamingDataset(np.arange(100.0)[:, None], batch_size=4) as ds:
            ds.advance()
            means = iterates(8)
            average = EpochAverage(ds)
            walk(average, approx, ds, means)
            with pytest.warns(StreamWarning, match=r"averaged over 4 steps,"):
                average.apply(approx)
        assert average.epochs == 0
        np.testing.assert_allclose(mean_of(approx), means[4:].mean(0))

    def test_the_first_epoch_alone_does_not_count_after_a_burn_in(self, ds, approx):
        average = EpochAverage(ds)
        walk(average, approx, ds, iterates(4))
        with pytest.warns(StreamWarning, match="less than one whole epoch followed the burn-in"):
            average.apply(approx)

    @pytest.mark.parametrize("noise", [0.0, 1.0])
    def test_a_fit_that_travels_is_left_as_it_is(self, ds, approx, noise):
        means = 0.1 * np.arange(100)[:, None] + noise * iterates(100)
        average = EpochAverage(ds)
        walk(average, approx, ds, means)
        with pytest.warns(StreamWarning, match=r"means still travel: that of mu\[.\] moved by"):
            average.apply(approx)
        np.testing.assert_array_equal(mean_of(approx), means[-1])

    @pytest.mark.parametrize("arrival", [0.55, 0.65, 0.75])
    def test_the_way_to_where_the_means_stay_is_left_out(self, ds, approx, arrival):
        """They arrive after the burn-in, from hundreds of standard deviations away."""
        means = iterates(1_000)
        means[:, 0] += 5 * np.maximum(0, 1_000 * arrival - np.arange(1_000))
        average = EpochAverage(ds)
        walk(average, approx, ds, means)
        average.apply(approx)
        np.testing.assert_allclose(mean_of(approx), 0, atol=0.1)

    def test_means_that_arrive_last_are_left_as_they_are(self, ds, approx):
        means = iterates(1_000) + 5 * np.maximum(0, 970 - np.arange(1_000))[:, None]
        average = EpochAverage(ds)
        walk(average, approx, ds, means)
        with pytest.warns(StreamWarning, match=r"means still travel: .* polish\(approx, ds\)"):
            average.apply(approx)
        np.testing.assert_array_equal(mean_of(approx), means[-1])

    @pytest.mark.parametrize("steps", [70, 85, 100])
    def test_the_tail_of_an_arrival_is_left_out_or_told_of(self, ds, approx, steps):
        """Each step closes a part of the distance, which single steps scatter more than."""
        rng = np.random.default_rng(0)
        means = 40 * rng.normal(size=(1_000, 2))
        means[:, 0] += 10_000 * np.exp(-np.maximum(0, np.arange(1_000) - 500) / steps)
        average = EpochAverage(ds)
        walk(average, approx, ds, means)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            average.apply(approx)
        assert told or abs(mean_of(approx)[0]) < 8

    def test_a_correlated_path_that_stays_is_averaged(self, ds, approx):
        """It forgets its place in 10 steps; a false alarm is one of 5 standard deviations."""
        rng = np.random.default_rng(0)
        path = [np.zeros(2)]
        for _ in range(1_000):
            path.append(0.9 * path[-1] + rng.normal(size=2))
        average = EpochAverage(ds)
        walk(average, approx, ds, path)
        average.apply(approx)


class TestRefusals:
    def test_a_source_is_no_dataset(self):
        with pytest.raises(TypeError, match=r"ds=ndarray.* is not a StreamingDataset; pass the"):
            EpochAverage(np.zeros((9, 2)))

    @pytest.mark.parametrize("burn_in", [-0.1, 1])
    def test_burn_in_is_a_part(self, ds, burn_in):
        with pytest.raises(
            ValueError, match=f"burn_in must be at least 0 and below 1, got {burn_in}"
        ):
            EpochAverage(ds, burn_in=burn_in)

    def test_an_average_of_nothing(self, ds, approx):
        average = EpochAverage(ds)
        assert average.epochs == 0
        with pytest.raises(StreamError, match=r"has seen no step; pass it to pm.fit\(callbacks="):
            average.apply(approx)

    def test_another_models_approximation(self, ds, approx):
        average = EpochAverage(ds)
        walk(average, approx, ds, iterates(10))
        with pm.Model():
            pm.Normal("x", shape=3)
            other = pm.MeanField()
        with pytest.raises(StreamError, match="approx has other parameters than the average"):
            average.apply(other)

    def test_particles(self, ds):
        with normal_model(ds):
            particles = pm.Empirical(size=10)
        with pytest.raises(TypeError, match="neither a MeanField nor a FullRank"):
            EpochAverage(ds)(particles, None, 1)


@given(n=st.integers(1, 200), fraction=st.sampled_from([0, 0.3, 0.5, 0.9]), seed=st.integers(0, 9))
def test_bins_hold_the_moments_of_the_end_of_a_series(n, fraction, seed):
    """Lengths from one bin to several rounds of merging."""
    series = np.random.default_rng(seed).normal(3, 2, size=(n, 2))
    bins = Bins()
    for value in series:
        bins.add(value)
    kept = bins.after(fraction)
    end = merge(kept)
    assert bins.n == n
    assert len(bins.parts) <= 32
    assert end.n <= max(n - fraction * n, kept[-1].n)
    assert end.n >= min(n - fraction * n, n) - max(1, n // 8)
    np.testing.assert_allclose(end.mean, series[n - end.n :].mean(0))
    np.testing.assert_allclose(end.squares, series[n - end.n :].var(0) * end.n, atol=1e-9)
