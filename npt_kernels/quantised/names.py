"""Formats of quantised weights, the libraries that have them, and how to get one: names only, without torch.

A run's configuration is checked against these names before anything heavy is imported.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
from collections.abc import Iterator
from typing import Any

__all__ = ["FORMATS", "choose_library", "import_library", "missing_library"]

#: Format → libraries that have it, the default first.
FORMATS: dict[str, tuple[str, ...]] = {
    "int8": ("bitsandbytes", "torchao"),
    "nf4": ("bitsandbytes",),
    "int4": ("torchao",),
    "fp8": ("torchao",),
}


def choose_library(format: str, library: str = "auto") -> str:
    """The library of a format. Raises ``ValueError`` for a format or a pair that does not exist."""
    if format not in FORMATS:
        raise ValueError(f"quantization={format!r} is not known; choose {', '.join(FORMATS)} or none")
    if library == "auto":
        return FORMATS[format][0]
    if library not in FORMATS[format]:
        pairs = ", ".join(f"{f} by {' or '.join(libraries)}" for f, libraries in FORMATS.items())
        raise ValueError(
            f"quantization={format!r} does not exist in quantization_library={library!r}; there is {pairs}"
        )
    return library


def missing_library(name: str) -> str:
    """What to do without a library, in one clause."""
    others = [f for f, libraries in FORMATS.items() if any(library != name for library in libraries)]
    other = "torchao" if name == "bitsandbytes" else "bitsandbytes"
    return (
        f"needs {name}: pip install {name} (or 'npt_kernels[quant]'); {other} has {' and '.join(others)} "
        f"(optimization.quantization_library={other}); or set optimization.quantization=none"
    )


@contextlib.contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Both libraries log a warning for every optional kernel of other hardware that they do not find."""
    loggers = [logging.getLogger(name), logging.getLogger("torch.utils._pytree")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def import_library(name: str) -> Any:
    """bitsandbytes, or torchao's ``quantization``. Raises ``ImportError`` with the mend."""
    with _quiet(name):
        try:
            return importlib.import_module("torchao.quantization" if name == "torchao" else name)
        except ImportError as error:
            raise ImportError(missing_library(name)) from error
