"""Slots: in order of arrival, one owner each, none lost."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from preheat.models.text.slots import Slots


@given(st.integers(1, 4), st.lists(st.sampled_from(["join", "admit", "leave", "give up"])))
def test_slots_are_given_in_order_of_arrival_and_come_back(count: int, verbs: list[str]) -> None:
    slots: Slots[int] = Slots(count)
    waiting: list[int] = []
    running: dict[int, int] = {}
    for number, verb in enumerate(verbs, start=1000):  # ints beyond those that Python keeps once
        if verb == "join":
            slots.join(number)
            waiting.append(number)
        elif verb == "admit":
            admitted = slots.admit()
            if admitted is None:
                assert not waiting or len(running) == count
            else:
                slot, who = admitted
                assert who is waiting.pop(0)
                assert slot == min(set(range(count)) - running.keys())
                running[slot] = who
        elif verb == "leave" and running:
            slots.leave(running.pop(max(running)))
        elif verb == "give up" and waiting:
            slots.leave(waiting.pop())
        assert dict(slots.running) == running
        assert slots.num_waiting == len(waiting)
        assert slots.idle == (not waiting and not running)


def test_who_has_left_is_not_missed() -> None:
    slots: Slots[str] = Slots(1)
    slots.join("a")
    slots.admit()
    slots.leave("a")
    slots.leave("a")
    slots.join("b")
    assert slots.admit() == (0, "b") and slots.admit() is None
