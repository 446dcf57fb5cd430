"""Work ahead in a thread: what an iterator makes is ready when it is asked for."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

__all__ = ["Background"]

T = TypeVar("T")


class Background(Generic[T]):
    """Runs an iterator in a thread, from the first ``next`` on and at most ``capacity`` items ahead; the order is its own.

    A thread suffices: fast tokenizers and file reads release Python's lock. An error of the iterator is raised where the
    item would have come; nothing is left behind by :meth:`close`, which also runs when the iteration is left.

    Args:
        make: Makes the iterator, in the thread; it is given a function that says whether to stop early.
        capacity: Items that wait at most, beside the one in the making.
    """

    def __init__(self, make: Callable[[Callable[[], bool]], Iterator[T]], capacity: int = 1) -> None:
        self._make, self._capacity = make, capacity
        self._items: deque[T] = deque()
        self._change = threading.Condition()
        self._stopped = self._done = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="npt-text", daemon=True)

    def _work(self) -> None:
        try:
            for item in self._make(lambda: self._stopped):
                with self._change:
                    self._change.wait_for(lambda: self._stopped or len(self._items) < self._capacity)
                    if self._stopped:
                        return
                    self._items.append(item)
                    self._change.notify_all()
        except BaseException as error:
            self._error = error
        finally:
            with self._change:
                self._done = True
                self._change.notify_all()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        # Not in __init__: a Ctrl-C there would leave a thread that nobody can close.
        if self._thread.ident is None and not self._stopped:
            self._thread.start()
        with self._change:
            self._change.wait_for(lambda: self._items or self._done or self._stopped)
            if self._items:
                item = self._items.popleft()
                self._change.notify_all()
                return item
        if self._stopped:
            raise StopIteration
        self._thread.join()
        if self._error is not None:
            raise self._error
        raise StopIteration

    def close(self) -> None:
        """Stop the thread and wait for its end."""
        with self._change:
            self._stopped = True
            self._items.clear()
            self._change.notify_all()
        if self._thread.ident is not None:
            self._thread.join()
