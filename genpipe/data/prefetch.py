"""Work that is done ahead of its need and handed over in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def in_order(submit: Callable[[T], Future[R]], items: Iterable[T], *, ahead: int) -> Generator[tuple[T, R], None, None]:
    """Each item and the result of `submit(item)`, in the order of the items, at most `ahead` of them under way."""
    window: deque[tuple[T, Future[R]]] = deque()
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
