"""k8s-notification-source and endpoint-notification-source: what extractors are told of as it happens."""

from __future__ import annotations

from typing import Annotated, ClassVar

import msgspec

from epp.plugins.base import Plugin


class K8sNotificationSource(Plugin):
    """Objects of one kind in Kubernetes, by group (empty: core), version and kind. Accepted: plugins here need no such source."""

    type: ClassVar[str] = "k8s-notification-source"
    roles: ClassVar[tuple[str, ...]] = ("data-source",)

    version: Annotated[str, msgspec.Meta(min_length=1)]
    kind: Annotated[str, msgspec.Meta(min_length=1)]
    group: str = ""


class EndpointNotificationSource(Plugin):
    """Endpoints that come and go. Accepted: plugins here are always told of them."""

    type: ClassVar[str] = "endpoint-notification-source"
    roles: ClassVar[tuple[str, ...]] = ("data-source",)
