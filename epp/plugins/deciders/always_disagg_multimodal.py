"""always-disagg-multimodal-decider: requests with images, video or audio are encoded elsewhere."""

from __future__ import annotations

from typing import ClassVar

from epp.plugins.base import Plugin
from epp.types import Endpoint, LLMRequest


class AlwaysDisaggMultimodalDecider(Plugin):
    """True iff there is an image, a video or an audio clip in the prompt; embeddings made before do not count."""

    type: ClassVar[str] = "always-disagg-multimodal-decider"

    def disaggregate(self, request: LLMRequest, endpoint: Endpoint) -> bool:  # noqa: ARG002 - the protocol's
        return request.media > 0
