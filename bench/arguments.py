"""What arguments of several commands have in common."""

import argparse
import math
from collections.abc import Callable


def number(kind: Callable[[str], float], least: float) -> Callable[[str], float]:
    """A type for argparse: a finite number of that kind, at least so large."""

    def number(text: str) -> float:
        value = kind(text)
        if not (value >= least and math.isfinite(value)):
            raise argparse.ArgumentTypeError(f"{text} is not a number of at least {least:g}")
        return value

    return number
