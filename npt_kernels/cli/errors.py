"""Errors of the ``npt`` command: the package's own become one red line and exit code 2."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import typer

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["reports_errors"]

_Command = TypeVar("_Command", bound=Callable[..., Any])


def reports_errors(command: _Command) -> _Command:
    """Our own errors become one red line and exit code 2; Ctrl-C becomes 130. ``NPT_DEBUG=1`` shows the traceback."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except KeyboardInterrupt:
            if _first_to_say("stopped"):
                stderr().print("stopped", style="yellow")
            raise typer.Exit(130) from None
        except typer.Exit:  # a command's own exit code
            raise
        except Exception as error:
            message = _message(error)
            if message is None or os.environ.get("NPT_DEBUG", "") not in {"", "0"}:
                raise
            # What another process has said already is not said again.
            if type(error).__name__ != "OtherRankError" and _first_to_say(message):
                # A file's name may hold bytes that are no UTF-8.
                for line in message.encode("utf-8", "backslashreplace").decode().splitlines():
                    stderr().print("error: " + line, style="red", markup=False, highlight=False, soft_wrap=True)
            raise typer.Exit(2) from None

    return wrapped  # type: ignore[return-value]


def _first_to_say(message: str) -> bool:
    """Of several processes with the same message, one prints it."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return True
    from ..training.distributed import first_to_say

    return first_to_say(message)


def _message(error: Exception) -> str | None:
    """What to tell a user; ``None`` for an error that nobody foresaw, whose traceback is the message."""
    if isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] in _EXTRA_MODULES:
        return f"{error.name} is not installed; pip install 'npt_kernels[train]'"
    if type(error).__name__ == "OutOfMemoryError":
        return (
            "the GPU is out of memory; lower training.batch_size or data.max_length, set "
            "optimization.gradient_checkpointing=true or training.mode=local, and see `npt train --dry-run`"
        )
    if type(error).__name__.startswith("Dist") or "gloo/transport" in str(error):
        return f"the connection to another process broke: it ended, and says why itself ({str(error).splitlines()[0]})"
    foreseen = isinstance(error, (ValueError, TypeError, RuntimeError, FileNotFoundError))
    return str(error) if foreseen and _raised_here(error) else None


_EXTRA_MODULES = {"pydantic", "yaml", "rich", "transformers", "accelerate", "datasets", "matplotlib", "gguf"}


def _raised_here(error: Exception) -> bool:
    """Whether a ``raise`` of this package made the error, not a library below it."""
    traceback = error.__traceback__
    if traceback is None:
        return False
    while traceback.tb_next is not None:
        traceback = traceback.tb_next
    frame = traceback.tb_frame
    return str(frame.f_globals.get("__name__", "")).partition(".")[0] == "npt_kernels"


def stderr() -> Console:
    from rich.console import Console

    return Console(stderr=True)
