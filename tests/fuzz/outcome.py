"""What may come out of a case: the right answer, or one short line. Everything else is a finding."""

from __future__ import annotations

import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from npt_kernels import BackendUnavailableError

__all__ = ["LONGEST", "Hang", "outcome", "time_limit"]

#: Of a line: a configuration says each problem of a key that may be several things in a line of its own.
LONGEST = 1200


class Hang(BaseException):
    """A case that took longer than it may; no ``except Exception`` of the code under test takes it for its own."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise Hang(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def outcome(call: Callable[[], Any], *, names: tuple[str, ...] = (), also: tuple[type[Exception], ...] = ()) -> Any:
    """``("read", result, warnings)`` or ``("refused", message, [])``.

    A refusal is a ``ValueError``, ``TypeError`` or one of ``also``, one line of at most ``LONGEST`` characters that names one of
    ``names``. Any other exception passes through and fails the case.
    """
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            result = call()
        except (ValueError, TypeError, BackendUnavailableError, *also) as error:
            message = str(error)
            lines = message.strip("\n").split("\n")
            # A configuration says all its problems at once.
            assert len(lines) <= 40 and 0 < max(map(len, lines)) <= LONGEST, (
                f"{type(error).__name__}: {message[:500]!r}"
            )
            assert not names or any(name in message for name in names), f"names none of {names}: {message[:300]}"
            return "refused", message, []
    return "read", result, [str(warning.message) for warning in said]
