"""Random Unicode text that looks enough like text to meet a vocabulary's merges."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

RANGES = (
    *((0x20, 0x7E),) * 6,
    *((0x61, 0x7A),) * 4,
    *((0x20, 0x20), (0x0A, 0x0A), (0x30, 0x39)) * 3,
    *((0x09, 0x0D), (0xA0, 0x17F), (0x300, 0x36F), (0x370, 0x4FF), (0x5D0, 0x6FF), (0x900, 0xDFF)),
    *((0x2000, 0x206F), (0x2150, 0x218F), (0x3040, 0x30FF), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3)),
    *((0x1F300, 0x1FAFF), (0x1D7C0, 0x1D7FF), (0, 0xD7FF), (0xE000, 0x10FFFF)),
)
WORDS = (
    "the",
    " and",
    "don't",
    " It's",
    "\n\n",
    "    ",
    "Ærø",
    "你好",
    "\U0001f469\u200d\U0001f680",
    "e\u0301",
    "3.14",
)


def random_texts(generator: random.Random, names: Sequence[str], count: int) -> Iterator[str]:
    """`count` texts; now and then the name of a token in them."""
    for _ in range(count):
        ranges = generator.choices(RANGES, k=generator.randint(1, 3))
        parts = []
        for _ in range(generator.randint(1, 30)):
            parts.append(chr(generator.randint(*generator.choice(ranges))))
            if generator.random() < 0.2:
                parts.append(generator.choice(WORDS))
            if generator.random() < 0.02:
                parts.append(generator.choice(names))
        yield "".join(parts)
