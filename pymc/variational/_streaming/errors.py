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
"""What streaming raises and warns with."""

import warnings

import pymc.variational

__all__ = ["OrderError", "OrderWarning", "StreamError", "StreamWarning", "warn"]


class StreamError(RuntimeError):
    """The stream cannot go on without risking a wrong posterior."""


class StreamWarning(UserWarning):
    """The stream goes on, but something about it deserves a look."""


class OrderError(StreamError):
    """The rows come in an order that the stream does not mix."""


class OrderWarning(StreamWarning):
    """The rows come in an order that the stream does not mix."""


def warn(message: str, category: type[StreamWarning] = StreamWarning) -> None:
    """Warn at the line of the user's code that led here."""
    warnings.warn(message, category, skip_file_prefixes=tuple(pymc.variational.__path__))
