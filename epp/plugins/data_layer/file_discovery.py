"""file-discovery: endpoints from a file instead of Kubernetes."""

from __future__ import annotations

from typing import Annotated, ClassVar

import msgspec

from epp.plugins.base import Plugin


class FileDiscovery(Plugin):
    """`endpoints[]{name, namespace, address, port, labels}` of the YAML or JSON file at path, read again whenever it changes; watchFile is accepted."""

    type: ClassVar[str] = "file-discovery"
    roles: ClassVar[tuple[str, ...]] = ("discovery",)

    path: Annotated[str, msgspec.Meta(min_length=1)]
    watch_file: bool = False
