"""disagg-headers-handler and prefill-header-handler: accepted, for configurations that still name them."""

from __future__ import annotations

from typing import ClassVar

from epp.plugins.base import Plugin


class DisaggHeadersHandler(Plugin):
    """Does nothing: the profile handlers set `x-prefiller-host-port` and `x-encoder-hosts-ports` themselves."""

    type: ClassVar[str] = "disagg-headers-handler"
    deprecated: ClassVar[str] = "disagg-profile-handler"
    aliases: ClassVar[tuple[str, ...]] = ("prefill-header-handler",)
    roles: ClassVar[tuple[str, ...]] = ("header-handler",)

    prefill_profile: str = "prefill"
    encode_profile: str = "encode"
