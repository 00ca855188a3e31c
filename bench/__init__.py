"""Measurements of the picker, run as `python -m bench COMMAND`. Never imported by the product; what is measured and how is in README.md."""


class BenchError(Exception):
    """A measurement that cannot be trusted or cannot go on: a wrong reply, a server that died, a stream that stalled."""
