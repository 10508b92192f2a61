"""Files that are whole or absent, JSON that has one spelling, locks that die with their process."""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TEMPORARY = ".tmp-"


def canonical_json(value: Any) -> bytes:
    """One spelling of a JSON value: sorted keys, no spaces, ASCII, no NaN."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return text.encode("ascii")


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable; systems that cannot open folders do without."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)


@contextmanager
def whole_file(path: Path, *, replace: bool = True) -> Iterator[Path]:
    """Another name to write a file under; it gets its own in one step when the block ends.

    The file appears whole or not at all, even when the machine stops; after an error nothing of
    it is left.

    Args:
        path: where; the folder exists.
        replace: when False, an existing file of that name is never overwritten.

    Raises:
        OSError: when the disk is full, saying how much is free.
        FileExistsError: when the file exists and ``replace`` is False.
    """
    temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        if replace:
            os.replace(temporary, path)
        else:
            _publish(temporary, path)
    except OSError as error:
        written = temporary.stat().st_size if temporary.exists() else 0
        temporary.unlink(missing_ok=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(
                error.errno,
                f"{path.parent} must have room for {path.name} ({written:,} bytes so far), got "
                f"{_free(path.parent):,} bytes free. Nothing was changed: free some space and run "
                "the same command again.",
            ) from error
        raise
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_whole(path: Path, data: bytes, *, replace: bool = True) -> None:
    """``data`` as a ``whole_file``."""
    with whole_file(path, replace=replace) as temporary:
        temporary.write_bytes(data)


def size_of(folder: Path) -> int:
    """Bytes of all files in a folder and in those below it."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def read_json(path: Path) -> dict[str, Any]:
    """The file's dict, or an empty one where it is missing or torn."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def write_json(path: Path, value: Any) -> None:
    """A value as indented JSON in a ``whole_file``."""
    write_whole(path, (json.dumps(value, indent=1) + "\n").encode())


def _publish(temporary: Path, path: Path) -> None:
    """Give a finished file its name unless the name is taken: a hard link cannot overwrite."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise FileExistsError(
            errno.EEXIST,
            f"{path.name} must be a new name, got one that exists in {path.parent}. "
            "Another writer took it: give every writer its own rank.",
        ) from None
    except OSError as error:  # a file system without hard links
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS):
            raise
        if path.exists():
            raise FileExistsError(errno.EEXIST, f"{path} exists already.") from None
        os.replace(temporary, path)
        return
    temporary.unlink()


def _free(folder: Path) -> int:
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return 0


class Lock:
    """An exclusive lock on a file, released when the process ends, however it ends."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle: int | None = None

    def acquire(self, *, wait: bool) -> bool:
        """Take the lock; False when it is held elsewhere and ``wait`` is False."""
        import fcntl

        handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            os.close(handle)
            if error.errno in (errno.EAGAIN, errno.EACCES):
                return False
            raise
        os.ftruncate(handle, 0)
        os.write(handle, f"{socket.gethostname()} pid {os.getpid()}\n".encode())
        self._handle = handle
        return True

    def holder(self) -> str:
        """Who wrote into the lock file last."""
        try:
            return self.path.read_text().strip() or "unknown"
        except OSError:
            return "unknown"

    def release(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock for a few moments, waiting for it."""
    lock = Lock(path)
    lock.acquire(wait=True)
    try:
        yield
    finally:
        lock.release()


class JsonLines:
    """A file of one JSON value a line that is only added to; what a crash tore is skipped.

    Args:
        path: of the file; it and its folders are made where they are missing.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("ab+", buffering=0)
        size = self._file.seek(0, os.SEEK_END)
        if size:
            self._file.seek(size - 1)
            if self._file.read(1) != b"\n":
                self._file.write(b"\n")

    def __iter__(self) -> Iterator[Any]:
        with self.path.open("rb") as file:
            for line in file:
                try:
                    yield json.loads(line)
                except ValueError:
                    continue

    def add(self, value: Any) -> None:
        """Write a line; a reader of the file sees it at once."""
        self._file.write(json.dumps(value).encode() + b"\n")

    def close(self) -> None:
        self._file.close()
