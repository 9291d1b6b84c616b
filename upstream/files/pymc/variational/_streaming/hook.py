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
"""Give a fit the callbacks of the streams that its model uses, so that none can be forgotten."""

import weakref

from typing import TYPE_CHECKING

from pytensor.graph.traversal import ancestors
from pytensor.link.basic import Container

from pymc.variational._streaming.errors import StreamError

if TYPE_CHECKING:
    from pymc.model.core import Model
    from pymc.variational.streaming import StreamingDataset

__all__ = ["register", "with_streams"]

_datasets: "weakref.WeakKeyDictionary[Container, weakref.ref[StreamingDataset]]"
_datasets = weakref.WeakKeyDictionary()
"""By the container of the buffer, which a transformed model keeps."""


def register(dataset: "StreamingDataset") -> None:
    """Let fits of models that observe the buffer of *dataset* find it."""
    _datasets[dataset.as_tensor().container] = weakref.ref(dataset)


def with_streams(model: "Model", callbacks: list) -> list:
    """Return *callbacks* and, last, those of the model's streams that are not among them.

    Parameters
    ----------
    model : Model
    callbacks : list of callable
        Of a fit.

    Returns
    -------
    list of callable
        *callbacks* itself if nothing is missing.

    Raises
    ------
    StreamError
        If the model uses the stream wrongly, or its dataset is gone.
    """
    if not _datasets:
        return callbacks
    from pymc.variational.streaming import _FitCallback

    given = [callback._dataset for callback in callbacks if isinstance(callback, _FitCallback)]
    missing = [dataset for dataset in _streams_of(model) if dataset not in given]
    if not missing:
        return callbacks
    with model:
        return [*callbacks, *(dataset.fit_callback() for dataset in missing)]


def _streams_of(model: "Model") -> list["StreamingDataset"]:
    """Return the datasets whose buffers the log-probability is computed from."""
    roots = [*model.basic_RVs, *model.rvs_to_values.values(), *model.potentials]
    buffers = {a.container: a for a in ancestors(roots) if hasattr(a, "container")}
    return [_alive(_datasets[c], buffers[c].name) for c in buffers if c in _datasets]


def _alive(dataset: "weakref.ref[StreamingDataset]", name: str | None) -> "StreamingDataset":
    found = dataset()
    if found is None:
        raise StreamError(
            f"the model depends on the stream {name!r}, whose StreamingDataset is gone; "
            "keep a reference to it while the model is fitted"
        )
    return found
