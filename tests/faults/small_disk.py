"""A disk of a few hundred KB that can be filled and made read-only: a tmpfs, where this user may mount one."""

from __future__ import annotations

import contextlib
import resource
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

__all__ = ["SmallDisk", "may_mount", "shorter_files", "small_disk"]


class SmallDisk:
    """A mounted tmpfs."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.ballast = folder, folder / "ballast"

    def fill(self, leave: int = 0) -> None:
        """Until ``leave`` bytes are free."""
        with self.ballast.open("ab") as stream, contextlib.suppress(OSError):
            while True:
                stream.write(b"\0" * 1024)
                stream.flush()
        if leave:
            with contextlib.suppress(OSError):
                size = self.ballast.stat().st_size
                with self.ballast.open("rb+") as stream:
                    stream.truncate(max(0, size - leave))

    def make_room(self) -> None:
        self.ballast.unlink(missing_ok=True)

    def read_only(self, wanted: bool) -> bool:
        """Whether it could be done: a file that is open for writing forbids it."""
        options = f"remount,{'ro' if wanted else 'rw'}"
        return subprocess.run(["mount", "-o", options, str(self.folder)], capture_output=True).returncode == 0


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
