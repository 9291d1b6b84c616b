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
"""The experiment on tables that take seconds, for tests that kill it.

python -m tests.orderbook.small_reproduce WORK STEPS

All of it runs in this process, so that PyMC is imported and a model compiled once.
"""

import sys

from pathlib import Path
from unittest.mock import patch

from benchmarks.orderbook import reproduce

SMALL = {"BILLION": 20_000, "BUFFER_SIZE": 5_000}


def run(work: Path, steps: int) -> None:
    def in_process(function, /, *args, **options):
        return function(*args, **options)

    with patch.multiple(reproduce, **SMALL, STEPS=steps, in_process=in_process):
        records = reproduce.run(work, sizes=())
    reproduce.publish({"records": records}, work / "results", None)


if __name__ == "__main__":
    run(Path(sys.argv[1]), int(sys.argv[2]))
