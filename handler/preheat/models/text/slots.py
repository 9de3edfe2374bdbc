"""Who has which slot, and who waits for one: no model, no clock."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from types import MappingProxyType
from typing import Generic, TypeVar

T = TypeVar("T")


class Slots(Generic[T]):
    """A fixed number of slots; who waits gets one in order of arrival. Those who come and go are
    told apart by identity.
    """

    def __init__(self, count: int) -> None:
        self._free = list(range(count))
        self._waiting: deque[T] = deque()
        self._running: dict[int, T] = {}

    @property
    def running(self) -> Mapping[int, T]:
        """By slot."""
        return MappingProxyType(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def idle(self) -> bool:
        return not self._running and not self._waiting

    def join(self, who: T) -> None:
        """Wait for a slot."""
        self._waiting.append(who)

    def admit(self) -> tuple[int, T] | None:
        """Give the one who has waited longest the lowest free slot."""
        if not self._waiting or not self._free:
            return None
        slot, who = min(self._free), self._waiting.popleft()
        self._free.remove(slot)
        self._running[slot] = who
        return slot, who

    def leave(self, who: T) -> None:
        """Wait no longer, or free the slot; who has left before is not missed."""
        self._waiting = deque(other for other in self._waiting if other is not who)
        for slot in [slot for slot, other in self._running.items() if other is who]:
            del self._running[slot]
            self._free.append(slot)
