"""Who compiles says so here, and who shows a run's progress hears of it: compiling takes seconds to minutes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

_clocks: list[Clock] = []
_is_under_way = False


@contextlib.contextmanager
def announced(what: str) -> Iterator[None]:
    """Inside the block ``what`` is compiled; blocks inside it belong to it."""
    global _is_under_way
    if _is_under_way:
        yield
        return
    _is_under_way, begun = True, time.monotonic()
    for clock in _clocks:
        clock.say(f"compiling {what}")
    try:
        yield
    finally:
        _is_under_way = False
        for clock in _clocks:
            clock.seconds += time.monotonic() - begun
            clock.say("")


class Clock:
    """Adds up the time that is spent on compiling from now on, until it is stopped.

    Args:
        say (callable): told what is compiled when that begins, and "" when it has ended.

    Attributes:
        seconds (float): spent so far.

    Example:
        >>> clock = Clock(print)
        >>> with announced("the updates"):
        ...     pass
        compiling the updates
        <BLANKLINE>
        >>> clock.stop()
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say, self.seconds = say, 0.0
        _clocks.append(self)

    def lap(self) -> float:
        """The seconds since the last lap."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds

    def stop(self) -> None:
        """Listens no more."""
        if self in _clocks:
            _clocks.remove(self)
