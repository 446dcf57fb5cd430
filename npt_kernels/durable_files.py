"""Files that survive a power cut: a name either shows the old content or the whole new one."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

__all__ = [
    "AppendedFile",
    "disk_errors",
    "is_disk_error",
    "private_folder",
    "sha256",
    "sync_directory",
    "sync_file",
    "write_whole",
]

#: A disk that is full, over its quota, read-only, broken or somebody else's; a file that may not grow.
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG, errno.EIO}
#: What safetensors and torch.save say where the system said one of those: errors of no use to whoever expects an ``OSError``.
_SAID = ("I/O error", "inline_container", "PytorchStreamWriter", "basic_ios::clear", "iostream error")


def is_disk_error(error: BaseException) -> bool:
    """Whether an error says that the disk does not take what is to be written."""
    return isinstance(error, OSError) and error.errno in _DISK


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Inside the block, what libraries raise when ``path`` cannot be written is an ``OSError``, with the system's reason."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) or not any(said in str(error) for said in _SAID):
            raise
        raise _of_the_disk(path, error) from error


def _of_the_disk(path: Path, error: BaseException) -> OSError:
    """torch says "unexpected pos 64 vs 0", and nobody would think of a full disk: a small file is tried in its place."""
    said = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    folder = path if path.is_dir() else path.parent
    probe = folder / f".probe.{os.getpid()}"
    try:
        with probe.open("wb", buffering=0) as stream:
            for _ in range(64):
                stream.write(b"\0" * 4096)
    except OSError as found:
        return OSError(found.errno, found.strerror, str(path))
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)
    number = errno.ENOSPC if "No space left" in said or "os error 28" in said else errno.EIO
    return OSError(number, said[:200], str(path))


def write_whole(path: Path, text: str) -> None:
    """A file that a stop at any moment leaves as it was or as it is to be."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        beside.write_text(text, encoding="utf-8")
        sync_file(beside)
        os.replace(beside, path)
    finally:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)


def private_folder(path: Path) -> Path:
    """The folder, made with what lacks above it for nobody but the user; one that is there stays as it is."""
    for missing in [*(p for p in reversed(path.parents) if not p.exists()), path]:
        missing.mkdir(mode=0o700, exist_ok=True)
    return path


class AppendedFile:
    """A file that grows by whole pieces. One that cannot be written is kept and written with the next, and never in part.

    Attributes:
        problem: Why the last piece is not on the disk yet; ``None``: all are.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.problem: OSError | None = None
        self._waiting = b""
        self._stream = path.open("ab", buffering=0)
        self._size = os.fstat(self._stream.fileno()).st_size

    def add(self, text: str) -> bool:
        """Whether it is written, and all before it."""
        self._waiting += text.encode()
        left = memoryview(self._waiting)
        try:
            while left:
                left = left[self._stream.write(left) :]
        except OSError as error:
            self.problem = error
            with contextlib.suppress(OSError):
                os.truncate(self.path, self._size)
            return False
        self._size += len(self._waiting)
        self._waiting, self.problem = b"", None
        return True

    def close(self) -> None:
        """What could not be written until now is tried once more, and lost then."""
        with contextlib.suppress(OSError):
            self.add("")
        with contextlib.suppress(OSError):
            self._stream.close()


def sync_file(path: Path) -> None:
    """Wait until the content is on the disk: a rename can reach it before the data of the renamed file does."""
    with path.open("rb+") as stream:
        os.fsync(stream.fileno())


def sync_directory(path: Path) -> None:
    """The same for the names in a directory, without which a rename may be undone by a power cut. Nothing on Windows."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Hex digest of a file, read a MiB at a time (``hashlib.file_digest`` came with Python 3.11)."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(2**20):
            digest.update(block)
    return digest.hexdigest()
