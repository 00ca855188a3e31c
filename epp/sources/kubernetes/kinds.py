"""Which kinds of object are watched, and the forms the API server tells of them in: lists, events of a watch, discovery.

Not here: what the objects mean (objects), list and watch themselves (reflector). Everything that reads bytes raises one of `UNREADABLE`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import msgspec

from epp.sources.kubernetes.objects import Seen


class Kind(NamedTuple):
    """One version of one group of what is watched."""

    name: str
    """For people: `pods`, `inferencepools.inference.networking.k8s.io`."""
    path: str
    read: Callable[[msgspec.Raw], Seen]

    @property
    def plural(self) -> str:
        return self.path.rpartition("/")[2]

    @property
    def version(self) -> str:
        """Group and version; empty for the core's, which every API server has."""
        return "/".join(self.path.split("/")[2:4]) if self.path.startswith("/apis/") else ""


class _ListMeta(msgspec.Struct):
    version: str = msgspec.field(name="resourceVersion", default="")
    next: str = msgspec.field(name="continue", default="")


class Page(msgspec.Struct):
    """Of a list."""

    meta: _ListMeta = msgspec.field(name="metadata", default_factory=_ListMeta)
    items: list[msgspec.Raw] | None = None


class Event(msgspec.Struct):
    """A line of a watch."""

    type: str
    object: msgspec.Raw


class Status(msgspec.Struct):
    """The object of an event that is an error."""

    code: int = 0
    reason: str = ""
    message: str = ""


class _Resource(msgspec.Struct):
    name: str


class Discovery(msgspec.Struct):
    """What the API server says it has of one version of a group."""

    version: str = msgspec.field(name="groupVersion")
    resources: list[_Resource]

    def lacks(self, kind: Kind) -> bool:
        return self.version == kind.version and all(each.name != kind.plural for each in self.resources)


read_page = msgspec.json.Decoder(Page).decode
read_event = msgspec.json.Decoder(Event).decode
read_status = msgspec.json.Decoder(Status).decode
read_discovery = msgspec.json.Decoder(Discovery).decode
