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
"""What this process still holds of a stream."""

import os
import threading

__all__ = ["open_files", "prefetch_threads"]


def open_files() -> set[str]:
    """Return the paths of the files that are open; reads /proc."""
    links = (os.path.join("/proc/self/fd", fd) for fd in os.listdir("/proc/self/fd"))
    return {os.path.realpath(link) for link in links if os.path.lexists(link)}


def prefetch_threads() -> list[threading.Thread]:
    """Return the threads that read ahead."""
    return [t for t in threading.enumerate() if t.name == "pymc-streaming-prefetch"]
