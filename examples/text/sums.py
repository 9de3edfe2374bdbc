"""Sums worked out aloud, digit by digit from the right: what the model learns, and what is right.

    What is 347 + 285?
    7+5+0=12, 4+8+1=13, 3+2+1=06: 632

Each column is written with the carry from the one before it, and all questions are of one length:
so what a token needs stands at a fixed distance before it, which a small model learns in minutes.
"""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass

COLUMNS = 3
"""Digits of a number."""
LEAST, MOST = 10 ** (COLUMNS - 1), 10**COLUMNS - 1
HELD_OUT = 10
"""One pair of so many is never learnt from."""


@dataclass(frozen=True, slots=True)
class Sum:
    """Two numbers from `LEAST` to `MOST`."""

    first: int
    second: int

    @property
    def question(self) -> str:
        return f"What is {self.first} + {self.second}?"

    @property
    def answer(self) -> str:
        """The working, and the sum."""
        first, second, carry, columns = self.first, self.second, 0, list[str]()
        for _ in range(COLUMNS):
            column = first % 10 + second % 10 + carry
            columns.append(f"{first % 10}+{second % 10}+{carry}={column:02}")
            first, second, carry = first // 10, second // 10, column // 10
        return f"{', '.join(columns)}: {self.first + self.second}"

    @property
    def is_held_out(self) -> bool:
        return zlib.crc32(f"{self.first}+{self.second}".encode()) % HELD_OUT == 0


def draw(dice: random.Random, *, held_out: bool = False) -> Sum:
    """One of those that are learnt from, or of the others."""
    while True:
        drawn = Sum(dice.randint(LEAST, MOST), dice.randint(LEAST, MOST))
        if drawn.is_held_out == held_out:
            return drawn


def is_right(asked: Sum, said: str) -> bool:
    """Whether an answer ends in the sum, however it was worked out."""
    return said.rpartition(":")[2].strip() == str(asked.first + asked.second)
