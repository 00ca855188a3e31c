"""Texts on the command line to values; what does not fit is an argparse error that says how to write it. Go's spellings are taken."""

from __future__ import annotations

import argparse

from epp.config import quantities

DEBUG_VERBOSITY = 4
_ZAP_LEVELS = {"debug": DEBUG_VERBOSITY, "info": 1, "error": 0, "panic": 0}


def port(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) <= 65535):
        raise argparse.ArgumentTypeError(f"{text!r} is not a port, 0 (any free) to 65535")
    return int(text)


def target_ports(text: str) -> list[int]:
    """`8000,8001`."""
    ports = [port(item.strip()) for item in text.split(",")]
    if 0 in ports:
        raise argparse.ArgumentTypeError(f"{text!r}: port 0 can't be connected to")
    return ports


def positive(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) >= 1):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def natural(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 0")
    return int(text)


def boolean(text: str) -> bool:
    """As Go's flag package reads one."""
    if text in ("1", "t", "T", "true", "TRUE", "True"):
        return True
    if text in ("0", "f", "F", "false", "FALSE", "False"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is not true or false")


def duration_s(text: str) -> float:
    """Seconds, 0 or more, of a Go duration: `50ms`, `1m30s`, `0`."""
    try:
        seconds = quantities.duration_s(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if seconds < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is negative")
    return seconds


def quantity_bytes(text: str) -> int:
    """Bytes, at least 1, of a Kubernetes quantity, with or without a B: `65536`, `64Mi`, `1GB`."""
    size = message_bytes(text)
    if not size:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write 65536, 64Mi or 1G")
    return size


def message_bytes(text: str) -> int:
    """The same; empty and 0 are 0, which stands for the default."""
    bare = text.strip()
    if len(bare) > 1 and bare[-1] in "Bb":
        bare = bare[:-1]
    try:
        size = quantities.quantity(bare or "0")
    except ValueError:
        size = -1
    if size < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write 65536, 64Mi or 1G")
    return size


def zap_level(text: str) -> int:
    """A level of the reference picker's logger as the `-v` that shows it: `info`, `error`, `debug` or a number."""
    if text.isascii() and text.isdigit():
        return int(text)
    if text.lower() not in _ZAP_LEVELS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a level; write {', '.join(_ZAP_LEVELS)} or a number")
    return _ZAP_LEVELS[text.lower()]
