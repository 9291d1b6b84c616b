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
the random streams), the positions of the data streams, and the losses so far.
"""

import json
import os
import re
import zipfile
import zlib

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytensor

from pytensor.compile.sharedvalue import SharedVariable
from pytensor.graph.basic import Constant, Variable
from pytensor.graph.traversal import ancestors
from pytensor.link.jax.linker import JAXLinker
from pytensor.printing import debugprint

import pymc

from pymc.variational._streaming.dataset import StreamingDataset
from pymc.variational._streaming.errors import StreamError, warn
from pymc.variational._streaming.fit.gaussian import as_streams
from pymc.variational._streaming.guards import WITHOUT_LOSS
from pymc.variational._streaming.utils import digest, positive_int, replacing
from pymc.variational.callbacks import Callback
from pymc.variational.inference import Inference
from pymc.variational.opvi import Approximation

__all__ = ["resumable_fit"]


def resumable_fit(
    inference: Inference,
    n: int,
    *,
    path: str | os.PathLike,
    datasets: StreamingDataset | Sequence[StreamingDataset],
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
        Local file of the checkpoint. If it exists, the fit goes on from there.
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
        Whether a progress bar is shown.
    **kwargs
        Options of :meth:`Inference.fit`.

    Returns
    -------
    Approximation
        Like that of :func:`pymc.fit`, also after an interrupt.

    Raises
    ------
    ValueError
        If the checkpoint is of another fit (see Notes), or has more steps than *n*; if
        *inference* has been fitted and there is no checkpoint; if *callbacks* hold that of a
        stream; or if the fit has no losses (``score=False``), or runs on JAX.
    StreamError
        If the checkpoint cannot be read.
    FloatingPointError
        If the loss is NaN, or parameters are not finite; the last checkpoint is kept.

    Notes
    -----
    The parameters, losses and batches are, bit for bit, those of a fit that was never stopped, on
    the same machine with the same versions; other versions are allowed, with a warning. No random
    seed is needed for that.

    A checkpoint is of another fit, and refused, if the method, the options, a variable's
    distribution or log-probability, a stream or the batch that the next step uses, or a callback
    whose state is saved is another one. Options are compared by what they print, functions by
    name. The values of ``pm.Data`` and of other shared arrays are not compared; of a scalar shared
    variable, such as a learning rate that a callback lowers, the first value is.

    The file is replaced at once: killed at any moment, the last checkpoint is whole. It holds
    no code. Beside the parameters, it has eight bytes for each step's loss.

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
    if "://" in os.fspath(path):
        raise ValueError(
            f"path={path!r} is a URI, and a checkpoint is a local file; pass a local path, and "
            "copy the file to the store"
        )
    if Path(path).is_dir():
        raise IsADirectoryError(f"path={path!r} is a folder; pass the name of a file")
    streams = as_streams(datasets)
    if any(getattr(callback, "is_of_stream", False) for callback in callbacks):
        raise ValueError(
            "resumable_fit adds the callbacks of its datasets; leave fit_callback() out of "
            "callbacks=, and pass all streams of the model as datasets="
        )
    if inference.state is not None and not Path(path).exists():
        raise ValueError(
            f"inference has been fitted before, but there is no checkpoint {path} to go back to; "
            "make it anew, for example by pm.ADVI(), or pass the path of its checkpoint"
        )
    inference.fit(0, progressbar=False, **kwargs)
    if not inference.state.score:
        raise ValueError(WITHOUT_LOSS)
    if isinstance(inference.state.step.maker.linker, JAXLinker):
        raise ValueError(
            'JAX keeps the state of its random draws where it cannot be saved; pass backend="numba"'
        )
    checkpoint = _Checkpoint(inference, streams, callbacks, kwargs, Path(path), every, n)
    try:
        checkpoint.go_on(progressbar)
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


@dataclass(slots=True)
class _Checkpoint(Callback):
    """Save the fit every so many steps; called after all other callbacks."""

    inference: Inference
    streams: Sequence[StreamingDataset]
    callbacks: Sequence[Callback]
    options: dict[str, Any]
    path: Path
    every: int
    n: int
    remembering: dict[str, Any] = field(init=False)
    """Callbacks whose state is saved, by name."""
    variables: dict[str, SharedVariable] = field(init=False)
    identity: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        self.remembering = {
            f"callback {k}": callback
            for k, callback in enumerate(self.callbacks)
            if hasattr(callback, "load_state_dict")
        }
        self.variables = _changing_variables(self.inference)
        self.identity = self._describe_fit()

    def go_on(self, progressbar: bool) -> None:
        """Make the steps that are left, from the last checkpoint on."""
        done, rows = self._restore()
        callbacks = [*self.callbacks, *(ds.fit_callback() for ds in self.streams), self]
        if rows:
            _require_same(self.path, rows, self._next_rows())
        self.inference.state = self.inference.state._replace(i=done, callbacks=callbacks)
        if done < self.n:
            # A checkpoint that cannot be written fails now, and not after many steps.
            self._write(np.empty(0), done)
            self.inference.refine(self.n - done, progressbar)

    def _restore(self) -> tuple[int, dict[str, str]]:
        """Go to the last checkpoint, and return its steps, and digests of the rows after it."""
        if not self.path.exists():
            return 0, {}
        header, arrays = _read(self.path)
        if header["versions"] != _versions():
            warn(
                f"{self.path} was saved with {header['versions']} and goes on with "
                f"{_versions()}: the numbers may differ from those of a fit that was never stopped"
            )
        _require_same(self.path, header["identity"], self.identity)
        if header["done"] > self.n:
            raise ValueError(
                f"n={self.n} but {self.path} has {header['done']} steps; "
                "pass at least as many, or another path"
            )
        for ds, position in zip(self.streams, header["streams"]):
            try:
                ds.load_state_dict(position)
            except ValueError as err:
                message = f"{self.path} is of another fit: {err}, or pass another path"
                raise ValueError(message) from None
        for name, variable in self.variables.items():
            value = arrays.get(name)
            if name in header["generators"]:
                value = variable.get_value()
                value.bit_generator.state = header["generators"][name]
            variable.set_value(value)
        for name, callback in self.remembering.items():
            prefix = f"{name} "
            seen = {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
            callback.load_state_dict(seen)
        self.inference.hist = arrays["losses"]
        return header["done"], header["rows"]

    def __call__(self, approx: Approximation, losses: np.ndarray, i: int) -> None:
        if i % self.every == 0 or i == self.n:
            self._require_finite(i)
            self._write(losses, i)

    def _write(self, losses: np.ndarray, done: int) -> None:
        """Replace the checkpoint by one of *done* steps, of which *losses* are the last."""
        before = self.inference.hist
        # There is a loss for each step of a long fit, so they are not copied without need.
        arrays = {"losses": np.concatenate([before, losses]) if len(before) else losses}
        generators = {}
        for name, variable in self.variables.items():
            value = variable.get_value()
            if isinstance(value, np.random.Generator):
                generators[name] = value.bit_generator.state
            else:
                arrays[name] = np.asarray(value)
        for name, callback in self.remembering.items():
            arrays |= {f"{name} {k}": np.asarray(v) for k, v in callback.state_dict().items()}
        header = {
            "versions": _versions(),
            "identity": self.identity,
            "done": done,
            "streams": [ds.state_dict() for ds in self.streams],
            "rows": self._next_rows(),
            "generators": generators,
        }
        text = np.frombuffer(json.dumps(header).encode(), np.uint8)
        with replacing(self.path) as file:
            np.savez(file, allow_pickle=False, header=text, **arrays)  # type: ignore[arg-type]

    def _describe_fit(self) -> dict[str, str]:
        """Describe what must be the same in each call, but for what streams compare themselves."""
        approx = self.inference.approx
        model = approx.model
        same = {
            "inference": f"{type(self.inference).__name__}, {type(approx).__name__}",
            "the options": _without_addresses(repr(self.options)),
        }
        for name, callback in self.remembering.items():
            same[name] = type(callback).__name__
        for k, ds in enumerate(self.streams):
            kind = f"{ds.as_tensor().name!r}, {ds.as_tensor().type}"
            same[f"stream {k}"] = f"{kind}, columns {ds.columns}, total_size {ds.total_size}"
        variables = [*model.free_RVs, *model.observed_RVs, *model.potentials]
        for v, factor in zip(variables, model.logp(variables, sum=False)):
            same[f"variable {v.name!r}"] = f"{v.str_repr()} with digest {_digest_graph(factor)}"
        for name, variable in self.variables.items():
            value = variable.get_value(borrow=True)
            same[name] = f"{variable.name}, {variable.type}, shape {np.shape(value)}"
            # A scalar may be the user's own, and would be set to the saved value.
            if variable.name and getattr(variable, "ndim", None) == 0:
                same[name] += f", at first {value}"
        return same

    def _next_rows(self) -> dict[str, str]:
        """Return a digest of the rows that the next step uses, for each stream."""
        return {
            f"the digest of the next batch of stream {k}": digest(rows.tobytes())
            for k, rows in enumerate(ds.as_tensor().get_value() for ds in self.streams)
        }

    def _require_finite(self, done: int) -> None:
        """Raise what the next step would, which computes its loss from these values."""
        for variable in self.variables.values():
            value = variable.get_value(borrow=True)
            # A scalar of the user's own, such as a bound, may be infinite.
            if np.ndim(value) and value.dtype.kind == "f" and not np.isfinite(value).all():
                raise FloatingPointError(
                    f"{variable.name or variable.type} is not finite after step {done}, so "
                    f"{self.path} is left as it was; lower the learning rate"
                )


def _changing_variables(inference: Inference) -> dict[str, SharedVariable]:
    """Return what steps or callbacks change, in the order of the graph.

    Callbacks may change scalars. The model's own data are not among them: their size has no
    bound.
    """
    own = inference.approx.model.named_vars
    inputs = [i for i in inference.state.step.maker.inputs if i.implicit]
    changing = [
        i.variable
        for i in inputs
        if i.update is not None
        or (getattr(i.variable, "ndim", None) == 0 and i.variable.name not in own)
    ]
    return {f"state {k}": variable for k, variable in enumerate(changing)}


def _digest_graph(output: Variable) -> str:
    """Return a digest of the operations and constants from which *output* is computed."""
    text = str(debugprint(output, print_type=True, file="str"))
    # Only the ends of long constants are printed.
    constants = [
        np.asarray(v.data).tobytes()
        for v in ancestors([output])
        if isinstance(v, Constant) and isinstance(v.data, np.ndarray)
    ]
    return digest(_without_addresses(text), constants)


def _without_addresses(text: str) -> str:
    return re.sub(" at 0x[0-9A-Fa-f]+", "", text)


def _require_same(path: Path, saved: dict[str, str], mine: dict[str, str]) -> None:
    for name in saved | mine:
        was, now = saved.get(name, "missing"), mine.get(name, "missing")
        if was != now:
            raise ValueError(
                f"{path} is of another fit: {name} is {now} where it was {was}; "
                "make the fit as it was then, or pass another path"
            )


def _versions() -> dict[str, str]:
    return {module.__name__: module.__version__ for module in (pymc, pytensor, np)}


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
