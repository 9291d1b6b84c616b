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
"""How many rows the whole data set has, declared and seen."""

import logging
import warnings

from typing import Literal

from pymc.variational._streaming.errors import StreamError, StreamWarning
from pymc.variational._streaming.sources.base import Source, positive_int

__all__ = ["TotalSize"]

logger = logging.getLogger(__name__)


class TotalSize:
    """The rows of a source, compared with those that are seen.

    Parameters
    ----------
    declared : int, "auto" or None
        None leaves likelihoods unscaled, with a warning.
    source : Source
        Asked for its rows, or counted in one pass, if *declared* is "auto".

    Raises
    ------
    ValueError, TypeError
        If *declared* is no number of rows, or there is nothing to count.
    """

    def __init__(self, declared: int | Literal["auto"] | None, source: Source):
        self._source = source
        self._auto = isinstance(declared, str)
        self._warned = False
        self.rows = self._resolve(declared)
        """For the ``total_size`` of observed variables."""

    def check_epoch(self, n_rows: int) -> None:
        """Compare the rows of an epoch that has ended with those before, and the declared ones."""
        before = self.rows if self._auto else self._source.n_rows
        if before not in (None, n_rows):
            raise StreamError(
                f"the source gave {n_rows} rows in an epoch but {before} before; "
                "the data changed: make the dataset anew"
            )
        if before is None and self.rows not in (None, n_rows) and not self._warned:
            self._warned = True
            _warn(self.rows, n_rows)

    def check_part(self, n_rows: int) -> None:
        """Compare the rows of an epoch that goes on with the declared ones: it may never end."""
        if self._warned or self._auto or self.rows is None or n_rows <= self.rows:
            return
        if self._source.n_rows is not None:
            return  # it was compared when the dataset was made
        self._warned = True
        warnings.warn(
            f"total_size={self.rows} but an epoch of the source has at least {n_rows} rows, so the "
            'likelihood is weighted wrongly; pass total_size="auto" or the number of rows, and a '
            "function whose blocks end after one epoch, since an endless one has no rows to count",
            StreamWarning,
            stacklevel=5,
        )

    def _resolve(self, declared: int | str | None) -> int | None:
        known = self._source.n_rows
        if declared is None:
            warnings.warn(
                "total_size=None leaves the likelihood of one batch unscaled against the "
                'prior; pass total_size="auto" or the number of rows',
                StreamWarning,
                stacklevel=4,
            )
            return None
        if isinstance(declared, str):
            if declared != "auto":
                raise ValueError(f'total_size={declared!r} is no number; pass an int or "auto"')
            return self._count() if known is None else known
        size = positive_int("total_size", declared)
        if known is not None and size != known:
            _warn(size, known)
        return size

    def _count(self) -> int:
        logger.info('total_size="auto": the source does not know its rows; counting them')
        n_rows = self._source.count()
        if not n_rows:
            raise ValueError("source has no rows")
        logger.info(f"counted {n_rows:,} rows")
        return n_rows


def _warn(declared: int | None, found: int) -> None:
    warnings.warn(
        f"total_size={declared} but the source holds {found} rows, so the likelihood is "
        f'weighted wrongly; pass total_size={found} or "auto"',
        StreamWarning,
        stacklevel=5,
    )
