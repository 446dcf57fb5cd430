"""A disk of a few MB that can be filled: a tmpfs, where this user may mount one; folders that may not be written to."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

__all__ = ["SmallDisk", "as_nobody", "may_mount", "shorter_files", "small_disk", "writable"]


class SmallDisk:
    """A mounted tmpfs."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.ballast = folder, folder / "ballast"

    def fill(self, leave: int = 0) -> None:
        """Until ``leave`` bytes are free, or there is not even room for the name of another file."""
        with contextlib.suppress(OSError), self.ballast.open("ab", buffering=0) as stream:
            while True:
                stream.write(b"\0" * 1024)
        with contextlib.suppress(OSError):
            os.truncate(self.ballast, max(0, self.ballast.stat().st_size - leave))

    def make_room(self) -> None:
        self.ballast.unlink(missing_ok=True)


@contextlib.contextmanager
def small_disk(folder: Path, kilobytes: int) -> Iterator[SmallDisk]:
    """Inside the block ``folder`` is a disk of its own. Raises ``CalledProcessError`` where it may not be mounted."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "npt-faults", str(folder)], check=True, capture_output=True
    )
    try:
        yield SmallDisk(folder)
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], capture_output=True)


def may_mount(folder: Path) -> bool:
    """Whether this user may mount a tmpfs here."""
    try:
        with small_disk(folder, 64):
            return True
    except (subprocess.CalledProcessError, OSError):
        return False


def shorter_files(limit: int) -> Callable[[], None]:
    """For the child: a write beyond ``limit`` bytes of a file fails (``RLIMIT_FSIZE``), as on a full disk but for the number."""

    def before() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return before


def as_nobody() -> None:
    """For the child: root may write anywhere, whatever the mode of a folder says."""
    if os.getuid() == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)


def writable(folder: Path, wanted: bool) -> None:
    """All folders below, for everybody; files that are open stay open."""
    for path in (folder, *folder.rglob("*")):
        if path.is_dir():
            path.chmod(0o777 if wanted else 0o555)
