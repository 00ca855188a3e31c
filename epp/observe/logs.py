"""Structured logs on stderr: one JSON object a line, or a readable line for a terminal.

Standard `logging`, with what a message is about in named fields rather than in its text:

    log = logging.getLogger(__name__)
    log.info("endpoint gone", extra={"fields": {"endpoint": endpoint.name}})
    if log.isEnabledFor(logging.DEBUG):  # building the fields costs more than the question
        log.debug("decision", extra={"fields": {...}})

Never put a prompt, a token or a secret in a message or a field. Lines look like the reference picker's (zap): level, ts, logger, msg.

Cost: a disabled level is one dict look-up, 0.05 µs.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import IO, Any, Literal

DEFAULT_VERBOSITY = 2
DEBUG_VERBOSITY = 4
"""`-v` at which debug lines are written (the reference picker's DEBUG); 5 is its TRACE, the same here."""
_RESERVED = frozenset({"level", "ts", "logger", "msg"})


class JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "level": record.levelname.lower(),
            "ts": _timestamp(record.created),
            "logger": record.name,
            "msg": record.getMessage(),
        }
        line.update({f"{key}_" if key in _RESERVED else key: value for key, value in _fields(record).items()})
        if record.exc_info:
            line["stacktrace"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, separators=(",", ":"), default=str)


class ConsoleFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        parts = [_timestamp(record.created), record.levelname, record.name, record.getMessage()]
        parts += [f"{key}={_word(value)}" for key, value in _fields(record).items()]
        text = "  ".join(parts)
        return f"{text}\n{self.formatException(record.exc_info)}" if record.exc_info else text


def setup(
    *, verbosity: int = DEFAULT_VERBOSITY, encoder: Literal["json", "console"] | None = None, stream: IO[str] | None = None
) -> logging.Handler:
    """Send the `epp` loggers, and warnings of libraries, to `stream` (stderr). The encoder follows the terminal where none is named.

    Called once, by the command line; calling it again replaces the handler. Returns the handler.
    """
    out = stream if stream is not None else sys.stderr
    handler = logging.StreamHandler(out)
    handler.setFormatter(ConsoleFormatter() if (encoder or ("console" if out.isatty() else "json")) == "console" else JsonFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("epp").setLevel(level(verbosity))
    return handler


def level(verbosity: int) -> int:
    """`-v` as a logging level: 0 warnings, 1 to 3 information, 4 and above everything."""
    if verbosity >= DEBUG_VERBOSITY:
        return logging.DEBUG
    return logging.INFO if verbosity > 0 else logging.WARNING


def _fields(record: logging.LogRecord) -> Mapping[str, Any]:
    fields = getattr(record, "fields", None)
    return fields if isinstance(fields, Mapping) else {}


def _word(value: Any) -> str:
    """One word on a line: what a client sent can't make it look like two fields or two lines."""
    text = str(value)
    return text if text.isprintable() and " " not in text and text else json.dumps(text, ensure_ascii=True)


def _timestamp(created_s: float) -> str:
    return datetime.fromtimestamp(created_s, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
