"""Values and errors of libraries in messages: one line, as short as it may be, however large the value is."""

from __future__ import annotations

import reprlib

__all__ = ["first_line", "shortened", "shown"]

#: Nine levels of nine references to one list are one line of YAML and 552 MB of ``repr``.
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 200
_REPR.maxlevel = 3

#: Of a whole line.
_LONGEST = 600


def shown(value: object) -> str:
    """``repr`` of about 200 characters at most; the middle of long texts and the end of long lists are left out."""
    return _REPR.repr(value)


def shortened(text: str) -> str:
    """One line of at most 600 characters, its middle left out."""
    line = " ".join(text.split("\n"))
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST - 200]} … {line[-190:]}"


def first_line(error: BaseException) -> str:
    """What an error of a library says, in one line of no more than 300 characters."""
    return next((line.strip()[:300] for line in str(error).split("\n") if line.strip()), type(error).__name__)
