"""What one publisher of KV-cache events has told: its names for blocks, and how far that can be relied upon.

The parts of the precise index that belong to one engine. Not here: the masks that join the engines, look-ups, limits (precise).

After a gap in the stream everything held is in doubt, for a lost frame may have been a clear, and blocks may be lacking. Doubt shrinks with what
proves a block: stored again, named as a parent, removed, or part of a prompt sent there since (the engine had it then, or will say that it
stored it). A view is relied upon again

* after a clear or a restart, or
* when what is in doubt and what is lacking are at most `DOUBT_SHARE` of what it holds, so a look-up is wrong at most that often, or
* when it has removed as many blocks as it held and lacked at the gap: engines evict the least recently used, so whatever was not used
  since is gone. What no prompt proved since is dropped then.
"""

from __future__ import annotations

DOUBT_SHARE = 0.1
SEEN_MAX = 200_000
"""Blocks of prompts sent since a gap that are kept as proof."""
NO_GROUP = -1


class Names:
    """An engine's names for the blocks it has in one tier."""

    __slots__ = ("before", "copies", "held", "shared")

    def __init__(self) -> None:
        self.held: dict[int, int] = {}
        """Engine's hash -> block. (The garbage collector does not look into a dict of numbers.)"""
        self.before: dict[int, int] = {}
        """The same, from before a gap and not proven since."""
        self.copies: dict[int, int] = {}
        """Engine's hash -> copies, where there are several."""
        self.shared: dict[int, int] = {}
        """Block -> names for it, where there are several: a LoRA loaded anew under its name, a namespace that is not published."""

    def __len__(self) -> int:
        return len(self.held) + len(self.before)


class View:
    """One publisher. Its column changes when all it held goes."""

    __slots__ = (
        "block_sizes",
        "column",
        "doubtful",
        "group",
        "lacking_blocks",
        "names",
        "prove_blocks",
        "removed_blocks",
        "reset_seen",
        "restart_seen",
        "seen",
        "speculative",
        "sweeping",
    )

    def __init__(self, column: int) -> None:
        self.column = column
        self.group: int | None = NO_GROUP
        """The group of layers that is followed: the first that was heard of."""
        self.block_sizes: set[int] = set()
        self.names: dict[str, Names] = {}
        """By tier."""
        self.speculative: dict[int, int] = {}
        """Block -> number of the last prompt sent with it."""
        self.doubtful = False
        self.sweeping: bool | None = None
        """What is in doubt is being gone through: True keeps all, False what was proven."""
        self.lacking_blocks = 0
        self.removed_blocks = 0
        """Since the gap."""
        self.prove_blocks = 0
        """So many removed prove that all from before the gap is gone."""
        self.seen: set[int] = set()
        """Blocks of prompts sent since the gap."""
        self.reset_seen = False
        self.restart_seen = False

    def __len__(self) -> int:
        return sum(map(len, self.names.values()))

    def block_of(self, name: int) -> int | None:
        """The block the engine calls so, in any tier; naming it as a parent proves it."""
        for names in self.names.values():
            block = names.held.get(name)
            if block is not None:
                return block
            block = names.before.pop(name, None)
            if block is not None:
                names.held[name] = block
                return block
        return None

    def doubt(self, lost_blocks: int) -> None:
        """Frames were lost."""
        self.lacking_blocks = (self.lacking_blocks if self.doubtful else 0) + lost_blocks
        self.doubtful, self.sweeping, self.removed_blocks = True, None, 0
        self.seen = set()
        self.prove_blocks = len(self) + self.lacking_blocks
        for names in self.names.values():
            fewer, more = sorted((names.before, names.held), key=len)  # what came since the last gap is little, if gaps are many
            more.update(fewer)
            names.before, names.held = more, {}

    def settle(self) -> bool:
        """Whether doubt is over, but for the sweep."""
        if self.removed_blocks >= self.prove_blocks:
            self.sweeping = False
            return True
        doubtful = sum(len(names.before) for names in self.names.values()) + max(0, self.lacking_blocks)
        if doubtful <= DOUBT_SHARE * len(self):
            self.sweeping = True
            return True
        return False

    def another(self) -> None:
        """The engine is another process: it may have other groups, which it names anew."""
        self.group = NO_GROUP

    def certain(self) -> None:
        """Whatever there was to doubt is settled."""
        self.doubtful, self.sweeping, self.lacking_blocks = False, None, 0
        self.seen = set()


class Leaving:
    """What a view held before it was cleared: to be dropped."""

    __slots__ = ("column", "names", "speculative")

    def __init__(self, view: View) -> None:
        self.column = view.column
        self.names = view.names
        for names in self.names.values():
            names.copies = {}  # nobody counts them any more
        self.speculative = view.speculative

    def __len__(self) -> int:
        return sum(map(len, self.names.values())) + len(self.speculative)
