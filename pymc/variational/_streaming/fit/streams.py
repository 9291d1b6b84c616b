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
"""The streams that a fit is checked, averaged or resumed with."""

from collections.abc import Sequence

from pymc.variational._streaming.dataset import StreamingDataset

__all__ = ["as_streams", "require_stream"]


def as_streams(ds: StreamingDataset | Sequence[StreamingDataset]) -> list[StreamingDataset]:
    """Return one stream or several as a list."""
    streams = list(ds) if isinstance(ds, Sequence) else [ds]
    for stream in streams:
        require_stream(stream)
    return streams


def require_stream(ds: StreamingDataset) -> None:
    """Raise a TypeError if *ds* is not a StreamingDataset."""
    if not isinstance(ds, StreamingDataset):
        raise TypeError(
            f"ds={type(ds).__name__}(...) is not a StreamingDataset; pass the one that is fitted"
        )
