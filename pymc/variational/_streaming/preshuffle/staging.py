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
"""Where a result is built out of sight, how a killed run goes on, and how the result appears.

Locally everything is built in a hidden folder beside the destination, and one rename publishes it.
Other filesystems cannot rename folders.  There the files are written in place, except the first,
which is held back and published last: every file says how many there must be, so that a source
refuses the others until it is there.
"""

import json
import os
import pathlib
import shutil
import threading
import uuid

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from pymc.variational._streaming.errors import StreamError
from pymc.variational._streaming.sources.parquet.files import import_pyarrow
from pymc.variational._streaming.sources.parquet.paths import resolve

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:
    import pyarrow.fs

__all__ = ["Staging", "open_staging"]

_in_this_process: set[str] = set()
"""Folders locked by threads of this process, which file locks do not tell apart."""
_guard = threading.Lock()


def open_staging(fs: "pyarrow.fs.FileSystem", destination: str, *, overwrite: bool) -> "Staging":
    """Prepare to build *destination*; use the result as a context manager.

    Raises
    ------
    FileExistsError
        If there is something already, and it must not be overwritten.
    StreamError
        If another run is building the same destination.
    """
    local = isinstance(fs, import_pyarrow().fs.LocalFileSystem)
    return (_LocalStaging if local else _RemoteStaging)(fs, destination, overwrite)


class Staging(ABC):
    """A result that is being built."""

    def __init__(self, fs: "pyarrow.fs.FileSystem", destination: str, overwrite: bool):
        self.fs = fs
        self.destination = destination
        self._overwrite = overwrite

    work: str
    """Folder that is gone when the result is published."""

    @abstractmethod
    def __enter__(self) -> "Staging": ...

    @abstractmethod
    def __exit__(self, *exc_info: Any) -> None: ...

    @abstractmethod
    def place(self, name: str, index: int) -> tuple[str, str | None]:
        """Return where a file of the result belongs, and where to draft it."""

    @abstractmethod
    def publish(self, sizes: dict[str, int]) -> None:
        """Make the files appear at the destination, after a last look at their sizes."""

    def resume(self, digest: str, scratch: str | None) -> None:
        """Keep what an earlier run with the same plan left, and discard all else."""
        found = self._read_json("plan.json") or {}
        plan = {"digest": digest, "scratch": scratch}
        if found != plan:
            self.discard()
            self._write_json("plan.json", plan)
        self.fs.create_dir(f"{self.work}/tasks", recursive=True)

    def discard(self) -> None:
        """Delete what an earlier run left, wherever it is."""
        found = self._read_json("plan.json") or {}
        if found.get("scratch"):
            self.clear_scratch(found["scratch"])
        self._discard()

    def scratch(self, scratch: str | None) -> tuple["pyarrow.fs.FileSystem", str]:
        """Make the folder for scatter files."""
        fs, folder = self._scratch_folder(scratch)
        fs.create_dir(folder, recursive=True)
        return fs, folder

    def clear_scratch(self, scratch: str | None) -> None:
        """Delete the folder for scatter files."""
        _delete(*self._scratch_folder(scratch))

    def results(self, kind: str) -> dict[int, dict[str, Any]]:
        """Return the results that were recorded, by task."""
        selector = import_pyarrow().fs.FileSelector(f"{self.work}/tasks", allow_not_found=True)
        names = [info.base_name for info in self.fs.get_file_info(selector)]
        chosen = [name for name in names if name.startswith(kind)]
        found = {int(name.split("-")[1]): self._read_json(f"tasks/{name}") for name in chosen}
        return {index: result for index, result in found.items() if result}

    def check_owner(self) -> None:
        """Raise StreamError if another run has taken the destination over."""

    def record(self, kind: str, index: int, result: dict[str, Any]) -> None:
        """Write down that a task is done."""
        self._write_json(f"tasks/{kind}-{index}", result)

    def _scratch_folder(self, scratch: str | None) -> tuple["pyarrow.fs.FileSystem", str]:
        if scratch is None:
            return self.fs, f"{self.work}/scratch"
        fs, folder = resolve(scratch)
        name = uuid.uuid5(uuid.NAMESPACE_URL, self.destination).hex
        return fs, f"{folder}/preshuffle-{name}"

    def _check(self, sizes: dict[str, int]) -> None:
        for info, (path, size) in zip(self.fs.get_file_info(list(sizes)), sizes.items()):
            if info.size != size:
                raise StreamError(
                    f"{path}: has {info.size} bytes, {size} were written; "
                    "another process touched it; run the same call again"
                )

    @abstractmethod
    def _discard(self) -> None: ...

    def _read_json(self, name: str) -> dict[str, Any] | None:
        """Read a small file; None if it is not there, or was cut short by a kill or a crash."""
        try:
            with self.fs.open_input_stream(f"{self.work}/{name}") as source:
                return json.loads(source.read())
        except (FileNotFoundError, ValueError):
            return None

    def _write_json(self, name: str, value: dict[str, Any]) -> None:
        with self.fs.open_output_stream(f"{self.work}/{name}") as sink:
            sink.write(json.dumps(value).encode())


class _LocalStaging(Staging):
    def __init__(self, fs, destination, overwrite):
        super().__init__(fs, os.path.realpath(destination), overwrite)
        parent, name = os.path.split(self.destination)
        self.work = os.path.join(parent, f".{name}.partial")
        self._files = f"{self.work}/files"
        self._old = f"{self.work}/old"
        self._lock = None

    def __enter__(self):
        self._require_replaceable()
        os.makedirs(self.work, exist_ok=True)
        self._lock = _lock(self.work, self.destination)
        try:
            self._look()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc_info):
        with _guard:
            _in_this_process.discard(self.work)
            self._lock.close()

    def place(self, name, index):
        os.makedirs(self._files, exist_ok=True)
        return f"{self._files}/{name}", f"{self.work}/{name}.{uuid.uuid4().hex}"

    def publish(self, sizes):
        self._check(sizes)
        for name in set(os.listdir(self._files)) - {os.path.basename(path) for path in sizes}:
            os.remove(f"{self._files}/{name}")
        if os.path.lexists(self.destination):
            os.rename(self.destination, self._old)
        os.rename(self._files, self.destination)
        shutil.rmtree(self.work, ignore_errors=True)

    def _require_replaceable(self):
        """Refuse what no rename can put a folder in the place of."""
        destination = self.destination
        if os.path.lexists(destination) and not os.path.isdir(destination):
            raise NotADirectoryError(f"destination={destination!r} is a file; pass a directory")
        if os.path.ismount(destination):
            raise ValueError(
                f"destination={destination!r} is a mount point, which cannot be replaced as a "
                "whole; pass a directory inside it"
            )
        if destination == os.path.realpath(os.getcwd()):
            raise ValueError(
                f"destination={destination!r} is the current directory, which would be replaced; "
                "pass another one"
            )

    def _look(self):
        for draft in pathlib.Path(self.work).glob("part-*"):
            draft.unlink()
        if os.path.lexists(self._old):
            if os.path.lexists(self.destination):  # published, and killed before it cleaned up
                shutil.rmtree(self._old)
            else:
                os.rename(self._old, self.destination)
        if not os.path.lexists(self.destination) or self._overwrite:
            return
        if os.listdir(self.destination):
            self.discard()
            shutil.rmtree(self.work)
            raise _exists(self.destination)

    def _discard(self):
        for entry in os.scandir(self.work):
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path)
            elif entry.name != "lock":
                os.remove(entry.path)


class _RemoteStaging(Staging):
    def __init__(self, fs, destination, overwrite):
        super().__init__(fs, destination, overwrite)
        self.work = f"{destination}/_preshuffle"
        self._run = uuid.uuid4().hex

    def __enter__(self):
        published = self._is_published()
        if published and not self._overwrite:
            _delete(self.fs, self.work)
            raise _exists(self.destination)
        if published:
            self.fs.delete_dir_contents(self.destination)
        self.fs.create_dir(self.work, recursive=True)
        self._write_json("run.json", {"run": self._run})
        return self

    def __exit__(self, *exc_info):
        pass

    def place(self, name, index):
        return f"{self.destination if index else self.work}/{name}", None

    def record(self, kind, index, result):
        self.check_owner()
        super().record(kind, index, result)

    def publish(self, sizes):
        self.check_owner()
        self._check(sizes)
        first = next(path for path in sizes if path.startswith(self.work))
        self.fs.move(first, f"{self.destination}/{first.rpartition('/')[2]}")
        _delete(self.fs, self.work)

    def _is_published(self):
        """Whether there are files, and not only those of an unfinished run."""
        selector = import_pyarrow().fs.FileSelector(self.destination, allow_not_found=True)
        names = {info.base_name for info in self.fs.get_file_info(selector)}
        unfinished = self._read_json("plan.json") is not None
        first = any(name.startswith("part-00000-") for name in names)
        return bool(names - {"", "_preshuffle"}) and (first or not unfinished)

    def check_owner(self):
        if self._read_json("run.json") != {"run": self._run}:
            raise StreamError(
                f"destination={self.destination!r}: another preshuffle took it over while this "
                "one was running; choose another destination"
            )

    def _discard(self):
        selector = import_pyarrow().fs.FileSelector(self.destination)
        for info in self.fs.get_file_info(selector):
            if info.base_name.startswith("part-"):
                self.fs.delete_file(info.path)
        _delete(self.fs, self.work)
        self.fs.create_dir(self.work, recursive=True)
        self._write_json("run.json", {"run": self._run})


def _lock(work: str, destination: str) -> Any:
    """Lock a folder until the handle is closed or the process dies."""
    busy = StreamError(
        f"destination={destination!r}: another preshuffle is writing it; "
        "wait until it is done, or choose another destination"
    )
    with _guard:
        if work in _in_this_process:
            raise busy
        handle = open(f"{work}/lock", "w")
        try:
            if fcntl is not None:
                # Unlike flock, this lock is not inherited by workers, which may live on.
                fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            handle.close()
            raise busy from None
        _in_this_process.add(work)
        return handle


def _exists(destination: str) -> FileExistsError:
    return FileExistsError(
        f"destination={destination!r} exists and is not empty; "
        "pass overwrite=True to replace it, or choose another"
    )


def _delete(fs: "pyarrow.fs.FileSystem", folder: str) -> None:
    try:
        fs.delete_dir(folder)
    except FileNotFoundError:
        pass
