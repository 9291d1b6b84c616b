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
"""A fit that goes on where it was killed, to the same numbers.

What the next step of a fit depends on, besides the model, is saved to one file every so many
steps: whatever the compiled step changes (the variational parameters, the optimizer's memory and
the random streams), where the streams of data are, and the losses so far.
"""

import json
import os
import warnings
import zipfile
import zlib

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytensor

from pytensor.compile.sharedvalue import SharedVariable
from pytensor.graph.traversal import ancestors

import pymc

from pymc.variational._streaming.errors import StreamError, StreamWarning
from pymc.variational._streaming.fit.identity import describe, digest
from pymc.variational._streaming.guards import WITHOUT_LOSS
from pymc.variational._streaming.sources.base import positive_int
from pymc.variational.callbacks import Callback
from pymc.variational.inference import Inference
from pymc.variational.opvi import Approximation

if TYPE_CHECKING:
    from pymc.variational.streaming import StreamingDataset

__all__ = ["resumable_fit"]


def resumable_fit(
    inference: Inference,
    n: int,
    *,
    path: str | os.PathLike,
    datasets: "StreamingDataset | Sequence[StreamingDataset]",
    every: int = 10_000,
    callbacks: Sequence[Callback] = (),
    progressbar: bool = True,
    **kwargs: Any,
) -> Approximation:
    """Fit, or go on with a fit that was killed, to the same numbers.

    Parameters
    ----------
    inference : Inference
        For example ``pm.ADVI()``, made as it was made for the first call. One that has been
        fitted is accepted only where there is a checkpoint, to which it goes back. Afterwards
        :meth:`Inference.refine` is refused.
    n : int
        Steps of the whole fit, those of earlier calls included.
    path : path_like
        File of the checkpoint. If it exists, the fit goes on from there.
    datasets : StreamingDataset or sequence of StreamingDataset
        The stream, or all streams, of the model, in the order of the first call. Their callbacks
        are added here.
    every : int, default 10_000
        Steps between checkpoints; a killed fit repeats fewer steps than that.
    callbacks : sequence of callable, optional
        Called after each step, before the streams go on. Their ``i`` counts the steps of the
        whole fit. What they remember is saved if they have ``state_dict()``, which gives
        arrays or numbers by name, and ``load_state_dict(state)``.
    progressbar : bool, default True
    **kwargs
        For :meth:`Inference.fit`.

    Returns
    -------
    Approximation
        Like that of :func:`pymc.fit`, also after an interrupt.

    Raises
    ------
    ValueError
        If the checkpoint is of another model, data, optimizer or option, or has more steps
        than *n*; if *inference* has been fitted and there is no checkpoint; if *callbacks* hold
        that of a stream; or if the fit has no losses (``score=False``), because PyMC then makes
        every step with the same random draw.
    StreamError
        If the checkpoint cannot be read.
    FloatingPointError
        If the loss is NaN, or parameters are not finite when they would be saved; the last
        checkpoint is kept.

    Notes
    -----
    The parameters, the losses and all later batches are, bit for bit, those of a fit that was
    never stopped, on the same machine with the same versions; other versions are allowed, with
    a warning. No random seed is needed for that.

    The file is replaced at once: killed at any moment, the last checkpoint is whole. It holds
    no code. Beside the parameters, it has eight bytes for each step's loss.

    Saved are the shared variables that the compiled step changes, and the scalar ones that a
    callback may change, such as a learning rate.

    Examples
    --------
    >>> import numpy as np
    >>> import pymc as pm
    >>> from pymc.variational.streaming import StreamingDataset
    >>> ds = StreamingDataset(np.ones((1_000, 1)), batch_size=100)
    >>> with pm.Model():
    ...     mu = pm.Normal("mu")
    ...     y = pm.Normal("y", mu, 1, observed=ds.as_tensor()[:, 0], total_size=ds.total_size)
    ...     approx = resumable_fit(
    ...         pm.ADVI(), 100, path="night.fit", datasets=[ds], progressbar=False
    ...     )
    >>> len(approx.hist)
    100
    """
    positive_int("n", n)
    positive_int("every", every)
    if any(getattr(callback, "is_of_stream", False) for callback in callbacks):
        raise ValueError(
            "resumable_fit adds the callbacks of its datasets; leave fit_callback() out of "
            "callbacks=, and pass all streams of the model as datasets="
        )
    if inference.state is not None and not Path(path).exists():
        raise ValueError(
            "inference has been fitted before, and would go on from where it is, but there is no "
            f"checkpoint {path}; make it anew, for example by pm.ADVI(), or pass the path of its "
            "checkpoint"
        )
    if not inference.objective.op.returns_loss:
        raise ValueError(
            f"{type(inference).__name__} has no loss, which is saved for each step; pass ADVI or "
            "FullRankADVI"
        )
    inference.fit(0, progressbar=False, **kwargs)
    if not inference.state.score:
        raise ValueError(WITHOUT_LOSS)
    streams = list(datasets) if isinstance(datasets, Sequence) else [datasets]
    fit = _ResumableFit(inference, streams, callbacks, kwargs)
    checkpoint = _Checkpoint(fit, Path(path), every, n)
    done = checkpoint.restore()
    try:
        in_order = [*callbacks, *(ds.fit_callback() for ds in streams), checkpoint]
        inference.state = inference.state._replace(i=done, callbacks=in_order)
        if done < n:
            checkpoint.rehearse()
            inference.refine(n - done, progressbar)
    finally:
        for ds in streams:
            ds.close()
        inference.state = inference.state._replace(step=_refuse_step, callbacks=[])
    inference.approx.hist = inference.hist
    return inference.approx


def _refuse_step() -> None:
    """Take the place of the step, which has no rows once the streams are closed."""
    raise StreamError(
        "the streams of this resumable_fit are closed; to go on, call resumable_fit again with "
        "more steps and the same path"
    )


class _Checkpoint(Callback):
    """Save the fit every so many steps; called after all other callbacks."""

    def __init__(self, fit: "_ResumableFit", path: Path, every: int, n: int):
        self._fit = fit
        self._path = path
        self._every = every
        self._n = n
        self._done = 0
        self._identity = fit.identity()

    def restore(self) -> int:
        """Go to the last checkpoint, and return how many steps it has."""
        if not self._path.exists():
            return 0
        header, arrays = _read(self._path)
        _warn_of_versions(self._path, header["versions"])
        _require_same(self._path, header["identity"], self._identity)
        self._done = header["done"]
        if self._done > self._n:
            raise ValueError(
                f"n={self._n} but {self._path} has {self._done} steps; "
                "pass at least as many, or another path"
            )
        self._fit.load(header["state"], arrays)
        return self._done

    def rehearse(self) -> None:
        """Fail now where a checkpoint would fail after many steps; no file is left or changed."""
        if not self._path.parent.is_dir():
            raise FileNotFoundError(f"path={self._path} is in no folder that exists; make it")
        part = _write_part(self._path, *self._content(np.empty(0)))
        part.unlink()

    def __call__(self, approx: Approximation, losses: np.ndarray, i: int) -> None:
        self._done += 1
        if self._done % self._every and self._done != self._n:
            return
        self._fit.require_finite(self._path, self._done)
        os.replace(_write_part(self._path, *self._content(losses)), self._path)

    def _content(self, losses: np.ndarray) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        state, arrays = self._fit.state(losses)
        header = {
            "versions": _versions(),
            "identity": self._identity,
            "done": self._done,
            "state": state,
        }
        return header, arrays


class _ResumableFit:
    """What the next step depends on, and what tells this fit from another."""

    def __init__(
        self,
        inference: Inference,
        datasets: Sequence["StreamingDataset"],
        callbacks: Sequence[Callback],
        options: dict[str, Any],
    ):
        self._inference = inference
        self._datasets = datasets
        self._callbacks = {
            str(k): callback
            for k, callback in enumerate(callbacks)
            if hasattr(callback, "load_state_dict")
        }
        self._options = options
        self._variables = _changing_variables(inference)
        # What cannot be saved fails here, and not after the first ten thousand steps.
        self.state(np.empty(0))

    def identity(self) -> dict[str, str]:
        """Describe the fit, one name for each thing that must be the same."""
        approx = self._inference.approx
        model = approx.model
        described = {"inference": f"{type(self._inference).__name__}, {type(approx).__name__}"}
        described["the options"] = describe(self._options)
        for ds in self._datasets:
            described[f"stream {ds.as_tensor().name!r}"] = (
                f"{ds.as_tensor().type}, columns {ds.columns}, total_size {ds.total_size}"
            )
        for rv in [*model.free_RVs, *model.observed_RVs, *model.potentials]:
            described[f"variable {rv.name!r}"] = rv.str_repr()
        logp = model.logp()
        described["the digest of the log-probability"] = digest([logp])
        # Transforming a model copies its shared variables, but they keep the container.
        of_model = [getattr(a, "container", None) for a in ancestors([logp])]
        for k, variable in enumerate(self._variables):
            shape = np.shape(variable.get_value(borrow=True))
            described[f"state {k}"] = f"{variable.name} {variable.type} {shape}"
            if variable.container in of_model:  # a scalar, which only a callback may change
                described[f"the first value of {variable.name!r}"] = str(variable.get_value())
        for at, callback in self._callbacks.items():
            described[f"callback {at}"] = type(callback).__name__
        return described

    def state(self, losses: np.ndarray) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Return what to save, as plain JSON and as arrays."""
        before = self._inference.hist
        # There is one for each step of a long fit, so they are not copied without need.
        arrays = {"losses": np.concatenate([before, losses]) if len(before) else losses}
        random = {}
        for k, variable in enumerate(self._variables):
            value = variable.get_value()
            if isinstance(value, np.random.Generator):
                random[str(k)] = value.bit_generator.state
            elif isinstance(value, np.ndarray):
                arrays[str(k)] = value
            else:
                raise TypeError(
                    f"the state of this fit has a {type(value).__name__} ({variable.type}), which "
                    'cannot be saved; pass backend="numba" or "c"'
                )
        for at, callback in self._callbacks.items():
            for name, seen in callback.state_dict().items():  # type: ignore[attr-defined]
                array = np.asarray(seen)
                if array.dtype.hasobject:
                    raise TypeError(
                        f"state_dict()[{name!r}] of the callback {type(callback).__name__} is a "
                        f"{type(seen).__name__}, which cannot be saved; give arrays or numbers"
                    )
                arrays[f"callback {at} {name}"] = array
        return {"random": random, "streams": [ds.state_dict() for ds in self._datasets]}, arrays

    def require_finite(self, path: Path, done: int) -> None:
        """Raise what the next step would, which computes its loss from these values."""
        for variable in self._variables:
            value = variable.get_value(borrow=True)
            # A scalar of the user's own, such as a bound, may be infinite.
            if np.ndim(value) and value.dtype.kind == "f" and not np.isfinite(value).all():
                raise FloatingPointError(
                    f"{variable.name or variable.type} is not finite after step {done}, so {path} "
                    "is left as it was; lower the learning rate, or look for rows or parameters "
                    "at which the gradient is not finite"
                )

    def load(self, state: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        """Go back to what was saved."""
        for ds, position in zip(self._datasets, state["streams"]):
            ds.load_state_dict(position)
        for k, variable in enumerate(self._variables):
            if str(k) in arrays:
                variable.set_value(arrays[str(k)])
            else:
                bits = np.random.PCG64()
                bits.state = state["random"][str(k)]
                variable.set_value(np.random.Generator(bits))
        for at, callback in self._callbacks.items():
            prefix = f"callback {at} "
            callback.load_state_dict(  # type: ignore[attr-defined]
                {key.removeprefix(prefix): a for key, a in arrays.items() if key.startswith(prefix)}
            )
        self._inference.hist = arrays["losses"]


def _changing_variables(inference: Inference) -> list[SharedVariable]:
    """Return what steps or callbacks change, in the order of the graph.

    The model's own data are not among them: their size has no bound.
    """
    inputs = [i for i in inference.state.step.maker.inputs if i.implicit]
    own = inference.approx.model.named_vars
    return [
        i.variable
        for i in inputs
        if i.update is not None
        or (getattr(i.variable, "ndim", None) == 0 and i.variable.name not in own)
    ]


def _require_same(path: Path, saved: dict[str, str], mine: dict[str, str]) -> None:
    for name in saved | mine:
        was, now = saved.get(name, "missing"), mine.get(name, "missing")
        if was != now:
            raise ValueError(
                f"{path} is of another fit: {name} is {now} where it was {was}; "
                "make the fit as it was then, or pass another path"
            )


def _versions() -> dict[str, str]:
    modules = {"pymc": pymc, "pytensor": pytensor, "numpy": np}
    return {name: module.__version__ for name, module in modules.items()}


def _warn_of_versions(path: Path, saved: dict[str, str]) -> None:
    if saved != _versions():
        warnings.warn(
            f"{path} was saved with {saved} and goes on with {_versions()}: "
            "the numbers may differ from those of a fit that was never stopped",
            StreamWarning,
            stacklevel=4,
        )


def _write_part(path: Path, header: dict[str, Any], arrays: dict[str, np.ndarray]) -> Path:
    """Write a file beside *path*, to the disk, that can replace it at once."""
    text = np.frombuffer(json.dumps(header).encode(), np.uint8)
    part = path.with_name(f".{path.name}.part")
    try:
        with open(part, "wb") as file:
            np.savez(file, allow_pickle=False, header=text, **arrays)  # type: ignore[arg-type]
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    return part


def _read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as found:
            arrays = dict(found)
        return json.loads(arrays.pop("header").tobytes()), arrays
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as err:
        raise StreamError(
            f"{path} is not a readable checkpoint ({type(err).__name__}: {err}); "
            "put a copy in its place, or delete it to start over"
        ) from err
