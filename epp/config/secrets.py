"""What of a configuration is not shown to people: passwords, by the name of their field or by their place in a URL.

A configuration refers to most secrets by files; what third parties' plugins call theirs can only be guessed. Not here: what is shown (effective).
"""

from __future__ import annotations

import re
from typing import Any

HIDDEN = "***"
_FIELD = re.compile(r"(?:password|passwd|passphrase|secret|api_?key)$", re.IGNORECASE)
_USER = re.compile(r"(?<=://)[^/?#\s]*@")
_USER_ALONE = re.compile(r"^[^/?#\s]*:[^/?#\s]*@(?=[^/?#\s@]+$)")
"""Of an address without a scheme: `user:password@host:6379`."""
_QUERY = re.compile(r"(?<=[?&])((?:password|passwd|secret|token|api_?key)=)[^&#\s]*", re.IGNORECASE)
_ADDRESSES = frozenset({"address", "url", "endpoint"})


def hidden(value: Any, field: str = "") -> Any:
    """A document with `HIDDEN` in place of its passwords."""
    secret = _FIELD.search(field) is not None
    if isinstance(value, dict):
        return {name: hidden(each, field if secret else str(name)) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [hidden(each, field) for each in value]
    if secret and value not in ("", None):
        return HIDDEN
    return hidden_url(value, alone=field in _ADDRESSES) if isinstance(value, str) else value


def hidden_url(text: str, *, alone: bool = False) -> str:
    """`alone`: it is an address, even where no scheme says so."""
    shown = _QUERY.sub(rf"\1{HIDDEN}", _USER.sub(f"{HIDDEN}@", text))
    return _USER_ALONE.sub(f"{HIDDEN}@", shown) if alone else shown
