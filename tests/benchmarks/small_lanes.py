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
"""What lanes run in tests of turns; it imports neither PyMC nor the package of tests."""

import os
import time

__all__ = ["sleeper", "spinner"]


def sleeper(seconds: float):
    return lambda n_steps: time.sleep(n_steps * seconds), 10


def spinner():
    assert "floatX=float32" in os.environ["PYTENSOR_FLAGS"].split(",")

    def spin(n_steps: int) -> None:
        end = time.process_time() + n_steps * 0.01
        while time.process_time() < end:
            pass

    return spin, 10
