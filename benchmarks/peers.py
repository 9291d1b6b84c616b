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
"""The DataLoader of pymc-extras, which asks for an older PyMC and so cannot be installed beside ours.

>>> loader = load_dataloader(fetch_dataloader(folder)).DataLoader(...)
"""

import importlib.util
import subprocess
import sys
import zipimport

from pathlib import Path
from typing import Any

__all__ = ["fetch_dataloader", "load_dataloader"]

PEER = "pymc-extras==0.15.1"


def fetch_dataloader(folder: Path) -> Path:
    """Download the wheel without its dependencies, unless *folder* holds it."""
    found = list(folder.glob("pymc_extras-*.whl"))
    if not found:
        command = "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"
        subprocess.run([sys.executable, *command, "--dest", folder, PEER], check=True)
        found = list(folder.glob("pymc_extras-*.whl"))
    return found[0]


def load_dataloader(wheel: Path) -> Any:
    """Import the one module, from the wheel; the package would import its dependencies."""
    importer = zipimport.zipimporter(f"{wheel}/pymc_extras/variational")
    spec = importer.find_spec("dataloader")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
