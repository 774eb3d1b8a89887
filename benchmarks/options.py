"""How the values of the command's options are read. A wrong one is an argparse error: one line, status 2."""

from __future__ import annotations

import argparse
from collections.abc import Callable


def positive_int(text: str) -> int:
    """A whole number of at least 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} should be a positive integer")
    return value


def non_negative(text: str) -> float:
    """A finite number of at least 0."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} should be a number, 0 or more")
    return value


def shape(text: str) -> tuple[int, int, int, int]:
    """T,B,I,H."""
    parts = text.split(",")
    if len(parts) != 4:
        raise argparse.ArgumentTypeError(f"{text!r} should be four numbers T,B,I,H, such as 50,32,128,128")
    sizes = [positive_int(part.strip()) for part in parts]
    return sizes[0], sizes[1], sizes[2], sizes[3]


def names(*choices: str) -> Callable[[str], list[str]]:
    """A list with commas, each of these choices, none twice."""

    def read(text: str) -> list[str]:
        values = [part.strip() for part in text.split(",")]
        for value in values:
            if value not in choices:
                raise argparse.ArgumentTypeError(f"{value!r} is none of {', '.join(choices)}")
        return list(dict.fromkeys(values))

    return read
