"""What happens to a simulated KV cache, as vLLM from 0.24 on says it: events as maps, a removal for each block, salts in clear.

A token's id is its four bytes. Not here: the cache (kv_cache), publishing (kv_events). Cost: 2 µs a block.
"""

from __future__ import annotations

import struct
from typing import Any


class KVEventLog:
    """What happened since it was last asked. Neighbouring blocks of one prompt become one event."""

    def __init__(self, block_tokens: int) -> None:
        self._block_tokens = block_tokens
        self._events: list[dict[str, Any]] = []
        self._last = 0
        """Hash of the last block stored, if nothing happened since."""

    def stored(self, block_hash: int, parent: int | None, content: bytes, salt: str) -> None:
        tokens = struct.unpack(f"<{self._block_tokens}I", content)
        if parent is not None and parent == self._last:
            event = self._events[-1]
            event["block_hashes"].append(block_hash)
            event["token_ids"].extend(tokens)
            event["extra_keys"].append(None)
        else:
            self._events.append({
                "type": "BlockStored",
                "block_hashes": [block_hash],
                "parent_block_hash": parent,
                "token_ids": list(tokens),
                "block_size": self._block_tokens,
                "lora_id": None,
                "medium": "GPU",
                "lora_name": None,
                "extra_keys": [[salt] if salt and parent is None else None],
                "group_idx": 0,
                "kv_cache_spec_kind": "full_attention",
            })  # fmt: skip
        self._last = block_hash

    def removed(self, block_hash: int) -> None:
        self._events.append({"type": "BlockRemoved", "block_hashes": [block_hash], "medium": "GPU", "group_idx": 0})
        self._last = 0

    def cleared(self) -> None:
        self._events.append({"type": "AllBlocksCleared"})
        self._last = 0

    def take(self) -> list[dict[str, Any]]:
        taken, self._events, self._last = self._events, [], 0
        return taken
