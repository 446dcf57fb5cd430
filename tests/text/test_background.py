"""A thread that works ahead: in order, bounded, its errors where they belong, gone when it is not needed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest

from npt_kernels.text.background import Background


def test_order_and_end() -> None:
    work = Background(lambda stopped: iter(range(50)))
    assert list(work) == list(range(50))
    assert list(work) == [] and not work._thread.is_alive()


def test_it_works_ahead_but_not_far() -> None:
    made = 0
    ahead = threading.Event()

    def items(stopped: Callable[[], bool]) -> Iterator[int]:
        nonlocal made
        for number in range(1000):
            made += 1
            if made == 4:
                ahead.set()
            yield number

    work = Background(items, capacity=2)
    assert next(work) == 0
    assert ahead.wait(10)  # one taken, two waiting, one in the making
    for number in range(1, 20):
        assert next(work) == number
        assert made <= number + 4
    work.close()
    assert made <= 24 and not work._thread.is_alive()


def test_errors_come_in_their_place() -> None:
    def items(stopped: Callable[[], bool]) -> Iterator[int]:
        yield 1
        raise ValueError("broken text")

    work = Background(items)
    assert next(work) == 1
    for _ in range(2):
        with pytest.raises(ValueError, match="broken text"):
            next(work)
    assert not work._thread.is_alive()


def test_closing_stops_work_that_is_under_way() -> None:
    started = threading.Event()

    def items(stopped: Callable[[], bool]) -> Iterator[int]:
        started.set()
        while not stopped():
            pass
        yield 1

    def take() -> None:
        got.extend(work)

    got: list[int] = []
    work = Background(items)
    taker = threading.Thread(target=take)
    taker.start()
    assert started.wait(10)
    work.close()
    work.close()
    taker.join(10)
    assert not taker.is_alive() and not work._thread.is_alive() and got == []


def test_closed_before_it_began() -> None:
    work = Background(lambda stopped: iter([1]))
    work.close()
    assert list(work) == []
