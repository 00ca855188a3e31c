"""Text to token ids with a Hugging Face tokenizer, piece by piece: pieces tokenized before come from the cache.

Text is cut only where the tokenizer itself is certain to: before an added token it finds in raw text, whatever is around it. Added tokens
are matched before anything is normalized, leftmost first; what is between two of them is tokenized by itself. So the ids of a text are
those of its pieces, joined; which added tokens qualify is checked when a tokenizer is loaded (`_cuts`). A tokenizer with none is used
whole. Pieces have `PIECE_CHARS_MIN` characters at least, counted from the beginning: a longer conversation is cut in the same places.

Costs: tokenizing holds no GIL; making Python numbers of the ids does, 20 ns a token.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator

from tokenizers import AddedToken, Tokenizer

from epp.tokenize.cache import PieceCache

PIECE_CHARS_MIN = 512
CUTTERS_MAX = 8
"""Different added tokens looked for."""
_PROBE = "a"


class TruncationError(ValueError):
    """Fewer tokens are to be kept than the special ones alone."""


class Encoder:
    """One tokenizer. Used by several threads at once."""

    def __init__(self, tokenizer: Tokenizer, cache: PieceCache, scope: bytes, likely: str = "") -> None:
        """`likely`: text with the added tokens prompts will have (a chat template). `scope` tells this tokenizer's pieces in the cache."""
        tokenizer.no_truncation()  # as Transformers: what the file says of them is the business of who trained it
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._cache = cache
        self._scope = scope
        self.cutters = _cuts(tokenizer.get_added_tokens_decoder().values(), likely)
        self._before, self._after = _special(tokenizer)

    def encode(self, text: str, *, special: bool, check: Callable[[], None]) -> bytes:
        """uint32 ids. `special`: add what the tokenizer puts around a text (BOS). `check` is called between pieces and may raise."""
        found = []
        for piece in _pieces(text, self.cutters):
            check()
            found.append(self._piece(piece))
        ids = b"".join(found)
        return self._before + ids + self._after if special else ids

    def kept(self, ids: bytes, tokens: int, side: str, *, special: bool) -> bytes:
        """As vLLM truncates to `tokens`: a request that names the side has everything cut, else what the tokenizer adds stays."""
        if side or not special:
            return _cut(ids, tokens, side or "left")
        around = len(self._before) + len(self._after)
        if len(ids) <= tokens * 4:
            return ids
        if tokens * 4 <= around:
            raise TruncationError
        inner = ids[len(self._before) : len(ids) - len(self._after)]
        return self._before + _cut(inner, tokens - around // 4, "left") + self._after

    def _piece(self, text: str) -> bytes:
        key = self._cache.key(self._scope, text.encode())
        found = self._cache.get(key)
        if found is None:
            (encoding,) = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)
            found = array("I", encoding.ids).tobytes()
            self._cache.put(key, found)
        return found


def _cut(ids: bytes, tokens: int, side: str) -> bytes:
    size = tokens * 4
    if size >= len(ids):
        return ids
    return ids[:size] if side == "right" or not size else ids[-size:]


def _cuts(added: Iterable[AddedToken], likely: str) -> tuple[str, ...]:
    """Added tokens no match of another one can reach into from the left, so that a match begins wherever they stand in a text."""
    tokens = list(added)
    if any(token.single_word for token in tokens):
        return ()  # those depend on the character before them, which a cut would hide
    raw = [token.content for token in tokens if not token.normalized]
    wanted = [
        token.content
        for token in tokens
        if not (token.normalized or token.lstrip) and token.content and token.content in likely and not token.content[0].isspace()
    ]
    return tuple(cut for cut in wanted if not any(_reaches(other, cut) for other in raw))[:CUTTERS_MAX]


def _reaches(other: str, cut: str) -> bool:
    """Whether `other` may begin before an occurrence of `cut` and end within or behind it."""
    return any(other.startswith(cut, at) or cut.startswith(other[at:]) for at in range(1, len(other)))


def _pieces(text: str, cutters: tuple[str, ...]) -> Iterator[str]:
    if not text:
        return
    start = 0
    ahead = [text.find(cutter, PIECE_CHARS_MIN) for cutter in cutters]
    while True:
        earliest = start + PIECE_CHARS_MIN
        for number, at in enumerate(ahead):
            if 0 <= at < earliest:
                ahead[number] = text.find(cutters[number], earliest)
        end = min((at for at in ahead if at >= 0), default=len(text))
        yield text[start:end]
        if end == len(text):
            return
        start = end


def _special(tokenizer: Tokenizer) -> tuple[bytes, bytes]:
    """What the tokenizer puts before and after a text."""
    plain = tokenizer.encode(_PROBE, add_special_tokens=False).ids
    full = tokenizer.encode(_PROBE, add_special_tokens=True).ids
    for at in range(len(full) - len(plain) + 1):
        if full[at : at + len(plain)] == plain:
            return array("I", full[:at]).tobytes(), array("I", full[at + len(plain) :]).tobytes()
    raise ValueError("what it adds to a text is not before or after it")
