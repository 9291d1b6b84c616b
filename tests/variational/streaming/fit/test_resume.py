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
"""A fit in pieces is the fit in one go, bit for bit, or it is refused."""

import errno
import json
import re
import subprocess
import sys

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytensor
import pytensor.tensor as pt
import pytest

import pymc as pm

from pymc.variational._streaming.sources.rows import RowFormat
from pymc.variational.opvi import Approximation
from pymc.variational.streaming import (
    EpochAverage,
    StreamError,
    StreamingDataset,
    StreamWarning,
    parquet_source,
    resumable_fit,
    shuffle_buffer,
)

ROOT = Path(__file__).parents[4]
QUICK = {"mode": "FAST_COMPILE"}
ADAM = pm.adam(learning_rate=0.05)


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    """Write 40 row groups of 50 rows, which are numbered."""
    rng = np.random.default_rng(0)
    columns = {"x": rng.normal(size=2_000), "y": rng.normal(size=2_000), "row": np.arange(2_000)}
    path = tmp_path_factory.mktemp("rows") / "rows.parquet"
    pq.write_table(pa.table(columns), path, row_group_size=50)
    return path


@pytest.fixture(scope="module")
def seven_steps(rows, tmp_path_factory) -> bytes:
    """Return the checkpoint of a fit of seven steps."""
    path = tmp_path_factory.mktemp("fit") / "f"
    fit(rows, path, 7)
    return path.read_bytes()


@pytest.fixture
def checkpoint(seven_steps, tmp_path) -> Path:
    path = tmp_path / "f"
    path.write_bytes(seven_steps)
    return path


def dataset(
    rows: Path, *, columns=("x", "y"), buffer_size=300, batch_size=64, seed=0, **kwargs
) -> StreamingDataset:
    source = parquet_source(rows, columns=list(columns))
    buffer = shuffle_buffer(source, buffer_size=buffer_size, batch_size=batch_size, seed=seed)
    return StreamingDataset(buffer, batch_size=batch_size, order_check="off", **kwargs)


def model_of(*datasets: StreamingDataset, prior_sd=1.0) -> pm.Model:
    with pm.Model() as model:
        a = pm.Normal("a", 0, prior_sd)
        sigma = pm.HalfNormal("sigma")
        for ds in datasets:
            mu = a * ds.as_tensor()[:, 0]
            name = f"y_{ds.as_tensor().name}"
            pm.Normal(name, mu, sigma, observed=ds.as_tensor()[:, 1], total_size=ds.total_size)
    return model


def fit(rows: Path, path: Path, n: int, **kwargs) -> Approximation:
    """Fit in a new model with new streams, as another process would."""
    datasets = kwargs.pop("datasets", None) or dataset(rows)
    model = kwargs.pop("model", {})
    make, seed = kwargs.pop("inference", pm.ADVI), kwargs.pop("seed", None)
    options = {"every": 7, "progressbar": False, "compile_kwargs": QUICK, "obj_optimizer": ADAM}
    with model_of(*(datasets if isinstance(datasets, list) else [datasets]), **model):
        inference = make(random_seed=seed)
        return resumable_fit(inference, n, path=path, datasets=datasets, **options | kwargs)


def numbers(approx: Approximation) -> dict[str, np.ndarray]:
    return {p.name: p.get_value() for p in approx.params} | {"losses": approx.hist}


def assert_equal(approx: Approximation, expected: Approximation) -> None:
    for name, value in numbers(expected).items():
        np.testing.assert_array_equal(numbers(approx)[name], value, err_msg=name, strict=True)


class Die:
    """Fail after a step, as a fit that is killed then."""

    def __init__(self, step: int):
        self.step = step

    def __call__(self, approx, losses, i):
        if i == self.step:
            raise RuntimeError("killed")


class TestSameNumbers:
    """Only the first piece has the seed of the whole fit: the others know no more than the file."""

    def test_a_fit_that_died_ends_as_if_it_had_not(self, rows, tmp_path):
        """It died between checkpoints, with PyMC's default optimizer."""
        kwargs = {"obj_optimizer": pm.adagrad_window}
        expected = fit(rows, tmp_path / "whole", 60, seed=1, **kwargs)
        with pytest.raises(RuntimeError, match="killed"):
            fit(rows, tmp_path / "pieces", 60, seed=1, callbacks=[Die(54)], **kwargs)
        approx = fit(rows, tmp_path / "pieces", 60, **kwargs)
        assert len(approx.hist) == 60
        assert_equal(approx, expected)

    def test_several_streams_and_what_callbacks_remember_go_on_too(self, rows, tmp_path):
        """A rate goes on falling; 31 steps are an epoch, and the fit dies in the third."""

        def go_on(path, *more, **kwargs):
            datasets = [dataset(rows, name="s"), dataset(rows, batch_size=50, seed=1, name="t")]
            rate = pytensor.shared(0.1, name="rate")
            average = EpochAverage(datasets[0], burn_in=0.2)
            lower = lambda approx, losses, i: rate.set_value(0.1 / i)  # noqa: E731
            callbacks = [lower, average, *more]
            optimizer = pm.adam(learning_rate=rate)
            kwargs |= {"callbacks": callbacks, "datasets": datasets, "obj_optimizer": optimizer}
            return fit(rows, tmp_path / path, 130, **kwargs), average

        expected, whole = go_on("whole", seed=1)
        with pytest.raises(RuntimeError, match="killed"):
            go_on("pieces", Die(87), seed=1)
        approx, resumed = go_on("pieces")
        assert_equal(approx, expected)
        assert resumed.epochs == whole.epochs > 2
        for name, state in whole.state_dict().items():
            np.testing.assert_array_equal(resumed.state_dict()[name], state, err_msg=name)

    def test_steps_are_counted_from_the_beginning(self, rows, checkpoint):
        seen = []
        fit(rows, checkpoint, 12, callbacks=[lambda approx, losses, i: seen.append(i)])
        assert seen == [8, 9, 10, 11, 12]

    def test_a_finished_fit_is_given_back_without_a_step(self, rows, checkpoint):
        approx = fit(rows, checkpoint, 7, callbacks=[Die(step) for step in range(9)])
        with np.load(checkpoint) as saved:
            np.testing.assert_array_equal(approx.hist, saved["losses"])


class TestRefusals:
    @pytest.mark.parametrize(
        "change, message",
        [
            ({"model": {"prior_sd": 2.0}}, r"variable 'a' is .*\(0, 2\).* it was .*\(0, 1\)"),
            (
                {"obj_optimizer": pm.adam(learning_rate=0.02)},
                r"the options is .*'obj_optimizer': .*adam.*0\.02.* where it was .*0\.05",
            ),
            ({"inference": pm.FullRankADVI}, "inference is FullRankADVI"),
            ({"data": {"columns": ("y", "x")}}, r"columns \('y', 'x'\)"),
            ({"data": {"seed": 1}}, "is of another fit: seed=1 where .* saved with 0; .* the same"),
        ],
        ids="prior rate approximation columns seed".split(),
    )
    def test_another_fit_is_refused(self, rows, checkpoint, change, message):
        ds = dataset(rows, **change.pop("data", {}))
        with pytest.raises(ValueError, match=message):
            fit(rows, checkpoint, 9, datasets=ds, **change)

    def test_another_scalar_of_the_model_is_refused(self, rows, tmp_path):
        """It would be set back to the one that was saved."""

        def fit_with(n, log_sd):
            sd = pm.math.exp(pytensor.shared(log_sd, name="log_sd"))
            return fit(rows, tmp_path / "f", n, model={"prior_sd": sd})

        fit_with(7, -3.0)
        with pytest.raises(
            ValueError, match=r"log_sd, .* at first 2.0 where it was .* at first -3.0"
        ):
            fit_with(9, 2.0)
        assert len(fit_with(9, -3.0).hist) == 9

    def test_another_column_or_operation_is_refused(self, rows, tmp_path):
        """Neither shows in the model's text or in the types of the graph."""

        def fit_to(n, column, sums):
            ds = dataset(rows)
            with pm.Model():
                predictor = pm.Normal("a") + sums(ds.as_tensor(), axis=1)[:, 1]
                observed = ds.as_tensor()[:, column]
                pm.Normal("y", predictor, observed=observed, total_size=ds.total_size)
                return resumable_fit(
                    pm.ADVI(), n, path=tmp_path / "f", datasets=[ds], compile_kwargs=QUICK
                )

        fit_to(2, 0, pt.cumsum)
        for column, sums in ((1, pt.cumsum), (0, pt.cumprod)):
            with pytest.raises(ValueError, match=r"variable 'y' is .* where it was"):
                fit_to(3, column, sums)

    @pytest.mark.parametrize(
        "kind, message", [("array", "fingerprint"), ("factory", "next batch of stream 0")]
    )
    def test_other_rows_are_refused(self, tmp_path, kind, message):
        """A source without a fingerprint is known by the batch that follows the checkpoint."""

        def make(mean):
            rows = np.random.default_rng(0).normal(mean, 1, size=(1_000, 2))
            if kind == "factory":
                blocks = rows.reshape(10, 100, 2)
                rows = lambda: iter(blocks)  # noqa: E731
            buffer = shuffle_buffer(rows, buffer_size=500, batch_size=50, seed=3)
            return StreamingDataset(buffer, batch_size=50, order_check="off", total_size=1_000)

        fit(tmp_path, tmp_path / "f", 7, datasets=make(0))
        with pytest.raises(ValueError, match=message):
            fit(tmp_path, tmp_path / "f", 7, datasets=make(100))
        assert len(fit(tmp_path, tmp_path / "f", 9, datasets=make(0)).hist) == 9

    def test_fewer_steps_than_were_made_are_refused(self, rows, checkpoint):
        with pytest.raises(ValueError, match=r"n=6 but .*f has 7 steps; pass at least as many"):
            fit(rows, checkpoint, 6)

    def test_fits_without_losses_are_refused(self, rows, tmp_path):
        """PyMC 6.4 collects the updates of random streams from the outputs, which are none."""
        with pytest.raises(ValueError, match=r"score=False .* the same random draw"):
            fit(rows, tmp_path / "f", 9, score=False)

    def test_a_method_without_a_loss_is_named(self, tmp_path):
        with pm.Model():
            pm.Normal("mu")
            with pytest.raises(ValueError, match=r"no loss, .* fit with ADVI"):
                resumable_fit(pm.SVGD(n_particles=3), 9, path=tmp_path / "f", datasets=[])

    @pytest.mark.filterwarnings("ignore:The RandomType SharedVariables:UserWarning")
    def test_a_backend_whose_random_state_cannot_be_saved_is_refused(self, rows, tmp_path):
        pytest.importorskip("jax")
        with pytest.raises(ValueError, match=r'JAX keeps the state .* pass backend="numba"'):
            fit(rows, tmp_path / "f", 9, compile_kwargs={"mode": "JAX"})

    def test_callbacks_of_streams_are_left_to_it(self, rows, tmp_path):
        ds = dataset(rows)
        with pytest.raises(ValueError, match=r"leave fit_callback\(\) out of callbacks="):
            fit(rows, tmp_path / "f", 9, datasets=[ds], callbacks=[ds.fit_callback()])

    @pytest.mark.parametrize("damage", ["half", "bit", "other"])
    def test_a_damaged_file_is_named(self, rows, checkpoint, damage):
        good = checkpoint.read_bytes()
        at = good.index(b"NUMPY") + 200
        flipped = good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :]
        checkpoint.write_bytes(
            {"half": good[: len(good) // 2], "bit": flipped, "other": b"x"}[damage]
        )
        with pytest.raises(StreamError, match=r"f is not a readable checkpoint .* delete it"):
            fit(rows, checkpoint, 9)

    def test_other_versions_warn(self, rows, checkpoint, monkeypatch):
        monkeypatch.setattr(np, "__version__", "1.0")
        with pytest.warns(StreamWarning, match=r"f was saved with .* the numbers may differ"):
            fit(rows, checkpoint, 9)


class TestSameInference:
    """What a notebook has, whose cells are run again."""

    @pytest.fixture
    def again(self, rows, tmp_path):
        ds = dataset(rows)
        options = {"every": 7, "progressbar": False, "compile_kwargs": QUICK, "obj_optimizer": ADAM}
        with model_of(ds) as model:
            inference = pm.ADVI(random_seed=1)

        def go_on(n, *callbacks):
            with model:
                return resumable_fit(
                    inference, n, path=tmp_path / "f", datasets=[ds], callbacks=callbacks, **options
                )

        return go_on, inference

    def test_it_goes_back_to_its_checkpoint(self, rows, again, tmp_path):
        go_on, _ = again
        with pytest.raises(RuntimeError, match="killed"):
            go_on(30, Die(17))
        assert_equal(go_on(30), fit(rows, tmp_path / "whole", 30, seed=1))

    def test_it_goes_back_to_its_beginning_before_the_first_checkpoint_of_steps(self, again):
        def interrupt(approx, losses, i):
            raise KeyboardInterrupt

        go_on, _ = again
        go_on(30, interrupt)
        assert len(go_on(30).hist) == 30

    def test_without_a_checkpoint_it_is_refused(self, again):
        go_on, inference = again
        inference.fit(0, progressbar=False, compile_kwargs=QUICK)
        with pytest.raises(ValueError, match="inference has been fitted before"):
            go_on(30)

    def test_refine_is_refused_and_leaves_the_fit(self, again):
        go_on, inference = again
        before = {name: value.copy() for name, value in numbers(go_on(14)).items()}
        with pytest.raises(StreamError, match="call resumable_fit again with more steps"):
            inference.refine(5, progressbar=False)
        for name, value in numbers(inference.approx).items():
            np.testing.assert_array_equal(value, before[name], err_msg=name)
        assert len(go_on(15).hist) == 15


class TestFile:
    def test_a_checkpoint_that_fails_leaves_the_last_one(
        self, rows, checkpoint, seven_steps, monkeypatch
    ):
        def fail(file, **arrays):
            file.write(b"half")
            raise OSError(errno.ENOSPC, "no space left")

        with monkeypatch.context() as patch:
            patch.setattr(np, "savez", fail)
            with pytest.raises(OSError, match=r"no space left: '.*/f'$"):
                fit(rows, checkpoint, 9)
        assert checkpoint.read_bytes() == seven_steps
        assert [file.name for file in checkpoint.parent.iterdir()] == ["f"]
        fit(rows, checkpoint, 9)
        assert [file.name for file in checkpoint.parent.iterdir()] == ["f"]

    def test_a_checkpoint_that_cannot_be_written_fails_before_the_first_step(self, rows, tmp_path):
        class Best(Die):
            def state_dict(self):
                return {"best": None}

            def load_state_dict(self, state): ...

        with pytest.raises(ValueError, match="Object arrays cannot be saved"):
            fit(rows, tmp_path / "f", 9, callbacks=[Best(1)])
        with pytest.raises(FileNotFoundError, match=r"no/f'$"):
            fit(rows, tmp_path / "no" / "f", 9, callbacks=[Die(1)])
        with pytest.raises(ValueError, match="is a URI, and a checkpoint is a local file; pass"):
            fit(rows, "s3://bucket/f", 9, callbacks=[Die(1)])
        with pytest.raises(IsADirectoryError, match="is a folder; pass the name of a file"):
            fit(rows, tmp_path, 9, callbacks=[Die(1)])
        assert not list(tmp_path.iterdir())

    def test_parameters_that_are_not_finite_are_not_saved(self, rows, checkpoint, seven_steps):
        """The loss of the last step is finite."""

        def spoil(approx, losses, i):
            if i == 9:
                approx.params[0].set_value(np.full(2, np.nan))

        with pytest.raises(FloatingPointError, match=r"mu is not finite after step 9, so .*f is"):
            fit(rows, checkpoint, 9, callbacks=[spoil])
        assert checkpoint.read_bytes() == seven_steps

    @pytest.mark.skipif(sys.platform == "win32", reason="forks")
    def test_a_process_that_is_killed_goes_on_to_the_same_numbers(self, tmp_path):
        """Killed half through a checkpoint, and at a random moment."""
        script = "tests.variational.streaming.fit.killed_fit"
        command = [sys.executable, "-m", script, str(tmp_path)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.endswith("same numbers after 2 kills\n")


class TestStreamState:
    def test_resuming_reads_one_window_and_no_more(self, rows, monkeypatch):
        """Row groups before the window are skipped by their metadata; a read has 50 rows here."""
        monkeypatch.setattr("pymc.variational._streaming.sources.rows.PIECE_ROWS", 50)
        read = []
        to_rows = RowFormat.to_rows

        def count(self, batch, where):
            read.append(batch.num_rows)
            return to_rows(self, batch, where)

        with dataset(rows, columns=("row",), batch_size=50, prefetch=False) as ds:
            for _ in range(2 * 40 - 4):
                ds.advance()
            state, expected = ds.state_dict(), ds.as_tensor().get_value()
        monkeypatch.setattr(RowFormat, "to_rows", count)
        with dataset(rows, columns=("row",), batch_size=50, prefetch=False) as resumed:
            resumed.load_state_dict(json.loads(json.dumps(state)))
            resumed.advance()
            np.testing.assert_array_equal(resumed.as_tensor().get_value(), expected)
        assert sum(read) <= 300 + 2 * 50


def test_the_code_of_the_how_to_runs_and_goes_on(tmp_path, monkeypatch):
    page = (ROOT / "docs/source/streaming/resume.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    losses = []
    for n in ("20", "21"):
        names: dict = {}
        exec(compile(code.replace(" 2_000,\n", f" {n},\n"), "resume.md", "exec"), names)
        losses.append(names["approx"].hist)
    assert [len(loss) for loss in losses] == [20, 21]
    np.testing.assert_array_equal(losses[1][:20], losses[0])
