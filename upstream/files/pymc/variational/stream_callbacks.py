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
"""Callbacks that the data of a model bring with them."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pytensor.compile.sharedvalue import SharedVariable
from pytensor.graph.basic import Variable
from pytensor.graph.traversal import ancestors

if TYPE_CHECKING:
    from pymc.model.core import Model

__all__ = ["add_stream_callbacks"]


def add_stream_callbacks(
    callbacks: Sequence[Callable],
    model: "Model",
    more_replacements: Mapping[Variable, Any] | None = None,
) -> Sequence[Callable]:
    """Append the callbacks that shared variables of a model offer.

    A loader that streams minibatches through a shared variable sets ``tag.fit_callback`` of that
    variable to a function without arguments. It is called in the context of the model when a fit
    begins, and returns the callback that puts the next minibatch in after each step. It raises an
    error if the stream cannot be fitted, so that no minibatch is taken for all data.

    Parameters
    ----------
    callbacks : sequence of callable
        Callbacks that were passed to the fit.
    model : Model
    more_replacements : dict, optional
        Replacements of the fit, whose values can depend on streams, too.

    Returns
    -------
    sequence of callable
        *callbacks* itself if no variable offers one.
    """
    roots = [*model.basic_RVs, *model.rvs_to_values.values(), *model.potentials]
    roots += [v for v in (more_replacements or {}).values() if isinstance(v, Variable)]
    # Transforming a model copies its shared variables, but they keep the container.
    offers = {
        v.container: v.tag.fit_callback
        for v in ancestors(roots)
        if isinstance(v, SharedVariable) and hasattr(v.tag, "fit_callback")
    }
    if not offers:
        return callbacks
    with model:
        return [*callbacks, *(offer() for offer in offers.values())]
