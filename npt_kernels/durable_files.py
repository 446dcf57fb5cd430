"""Files that survive a power cut: a name either shows the old content or the whole new one."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

__all__ = ["sha256", "sync_directory", "sync_file"]


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
