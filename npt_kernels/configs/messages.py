"""Values in error messages: as short as a line allows, however large the value is."""

from __future__ import annotations

import reprlib

__all__ = ["shortened", "shown"]

#: Nine levels of nine references to one list are one line of YAML and 552 MB of ``repr``.
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 200
_REPR.maxlevel = 3

#: Of a whole line.
_LONGEST = 600


def shown(value: object) -> str:
    """``repr`` of at most about 200 characters; the middle of long texts and the end of long lists are left out."""
    return _REPR.repr(value)


def shortened(line: str) -> str:
    """One line of at most 600 characters, its middle left out."""
    line = " ".join(line.splitlines())
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST - 200]} … {line[-190:]}"
