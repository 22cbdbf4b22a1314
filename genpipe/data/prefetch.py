"""Work that is done ahead of its need and handed over in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, Protocol, TypeVar

T = TypeVar("T")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)


class Pending(Protocol[R_co]):
    """What a Future is to `in_order`."""

    def result(self) -> R_co:
        """Wait for it."""
        ...

    def cancel(self) -> bool:
        """Drop it if it has not begun."""
        ...


class Done(Generic[R]):
    """A result that is there already: a Future would cost as much as reading a piece from the cache."""

    def __init__(self, result: R) -> None:
        self._result = result

    def result(self) -> R:
        """It."""
        return self._result

    def cancel(self) -> bool:
        """It is too late for that."""
        return False


def in_order(
    submit: Callable[[T], Pending[R]], items: Iterable[T], *, ahead: int
) -> Generator[tuple[T, R], None, None]:
    """Each item and the result of `submit(item)`, in the order of the items, at most `ahead` of them under way."""
    window: deque[tuple[T, Pending[R]]] = deque()
    try:
        for item in items:
            window.append((item, submit(item)))
            if len(window) >= ahead:
                first, future = window.popleft()
                yield first, future.result()
        while window:
            first, future = window.popleft()
            yield first, future.result()
    finally:
        for _, future in window:
            future.cancel()


def prefetched(
    load: Callable[[T], R], items: Iterable[T], *, threads: int, ahead: int
) -> Generator[tuple[T, R], None, None]:
    """`(item, load(item))` in order; `threads` threads load up to `ahead` items before they are asked for.

    With no threads the consumer's own loads. Closing the generator drops what waits.
    """
    if not threads:
        yield from ((item, load(item)) for item in items)
        return
    with ThreadPoolExecutor(threads, "ahead") as pool:
        yield from in_order(lambda item: pool.submit(load, item), items, ahead=ahead)
