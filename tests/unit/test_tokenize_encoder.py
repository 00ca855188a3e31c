"""Text is cut only where the tokenizer cuts it: pieces from the cache make the same ids as the whole."""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from epp.tokenize import encoder as module
from epp.tokenize.cache import ENTRY_BYTES, PieceCache
from epp.tokenize.encoder import Encoder, TruncationError

TOKENIZER = Path(__file__).parent.parent / "data" / "tokenize" / "tokenizer.json"
TURN, END = "<|im_start|>", "<|im_end|>"


def nothing() -> None:
    """No limit."""


def trained(*added: AddedToken, pre: object = None, normalizer: object = None) -> Tokenizer:
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.pre_tokenizer = pre or pre_tokenizers.ByteLevel(add_prefix_space=False)
    if normalizer is not None:
        made.normalizer = normalizer
    words = ["hello world, this is a text  with spaces\n\nand lines " * 3, "<|im_start|>user im_end start"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made.train_from_iterator(
        words, trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>"], initial_alphabet=alphabet, show_progress=False)
    )
    made.add_special_tokens([AddedToken(TURN, normalized=False), AddedToken(END, normalized=False)])
    made.add_tokens(list(added))
    return made


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "of the tests": lambda: Tokenizer.from_file(str(TOKENIZER)),
    "bytes": trained,
    "bytes with a space first": lambda: trained(pre=pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "metaspace, first": lambda: trained(pre=pre_tokenizers.Metaspace(prepend_scheme="first")),
    "metaspace, always": lambda: trained(pre=pre_tokenizers.Metaspace(prepend_scheme="always")),
    "no pre-tokenizer but a normalizer": lambda: trained(
        pre=pre_tokenizers.Split("\0", "isolated"),
        normalizer=normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
    ),
    "strips": lambda: trained(normalizer=normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase(), normalizers.Strip()])),
    "others that take spaces": lambda: trained(
        AddedToken("<eats>", lstrip=True, rstrip=True, normalized=False),
        AddedToken("\n\n", normalized=False),
        AddedToken("  ", normalized=False),
    ),
    "others that overlap": lambda: trained(AddedToken("x<|im_", normalized=False), AddedToken("|>\n", normalized=False)),
    "others that are longer": lambda: trained(AddedToken("<|im_start|>user", normalized=False), AddedToken("<", normalized=False)),
    "others that are normalized": lambda: trained(AddedToken("hello", normalized=True), AddedToken("ser", normalized=True)),
    "words alone": lambda: trained(AddedToken("user", single_word=True, normalized=False)),
}
MADE = {name: make() for name, make in KINDS.items()}
PIECES = st.sampled_from(
    [TURN, END, "user", "\n", "\n\n", " ", "  ", "hello", "Hello world", "<", "|>", "x", "x<|im_", "start|>", "<eats>", " <eats> ", "é", "世界", "▁", "ser"]
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@given(texts=st.lists(st.lists(PIECES, max_size=12).map("".join), min_size=1, max_size=4))
@settings(max_examples=60, deadline=None)
def test_pieces_make_the_same_ids_as_the_whole(kind: str, texts: list[str]) -> None:
    tokenizer = MADE[kind]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PIECE_CHARS_MIN", 3)
        made = Encoder(tokenizer, PieceCache(1 << 20, b"k"), b"1", TURN + END)
        for text in ("".join(texts[:end]) for end in range(1, len(texts) + 1)):
            for special in (False, True):
                whole = tokenizer.encode(text, add_special_tokens=special).ids
                assert array("I", made.encode(text, special=special, check=nothing)).tolist() == whole


def test_which_added_tokens_are_certain_cuts() -> None:
    def cutters(kind: str) -> tuple[str, ...]:
        return Encoder(MADE[kind], PieceCache(0, b""), b"", TURN + END + "<eats>user\n\n").cutters

    assert cutters("bytes") == (TURN, END)
    assert cutters("others that take spaces") == (TURN, END), "not one that takes the space before it, nor a space"
    assert cutters("others that overlap") == (), "a match of another may begin before and end in it"
    assert TURN in cutters("others that are longer"), "whichever is longest, a match begins there"
    assert cutters("words alone") == (), "they depend on the character before them"
    assert Encoder(MADE["bytes"], PieceCache(0, b""), b"", "plain").cutters == ()


def conversation(turns: int) -> str:
    rng = random.Random(5)
    return "".join(f"{TURN}user\n{rng.getrandbits(4000):x}{END}\n" for _ in range(turns))


def test_a_conversation_that_grows_is_not_tokenized_from_its_start_again() -> None:
    cache = PieceCache(1 << 20, b"k")
    made = Encoder(Tokenizer.from_file(str(TOKENIZER)), cache, b"1", TURN)
    made.encode(conversation(20), special=False, check=nothing)
    assert (cache.hits_total, cache.misses_total) == (0, 20)
    longer = made.encode(conversation(22), special=False, check=nothing)
    assert (cache.hits_total, cache.misses_total) == (20, 22), "what was its last piece is one still, and two are new"
    assert longer == Encoder(Tokenizer.from_file(str(TOKENIZER)), PieceCache(0, b""), b"", "").encode(
        conversation(22), special=False, check=nothing
    )


def test_a_tokenizer_s_own_truncation_and_padding_do_not_count() -> None:
    tokenizer = Tokenizer.from_file(str(TOKENIZER))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=64)
    plain = Tokenizer.from_file(str(TOKENIZER)).encode("a text of some length", add_special_tokens=False).ids
    made = Encoder(tokenizer, PieceCache(0, b""), b"", "")
    assert array("I", made.encode("a text of some length", special=False, check=nothing)).tolist() == plain


def test_what_is_put_around_a_text_is_found_and_kept_in_a_truncation() -> None:
    tokenizer = Tokenizer.from_file(str(TOKENIZER))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    made = Encoder(tokenizer, PieceCache(0, b""), b"", "")
    ids = made.encode("def", special=True, check=nothing)
    whole = array("I", ids).tolist()
    assert whole == tokenizer.encode("def").ids
    assert (whole[0], whole[-1]) == (1, 2)

    def kept(tokens: int, side: str) -> list[int]:
        return array("I", made.kept(ids, tokens, side, special=True)).tolist()

    count = len(whole)
    assert kept(count, "") == kept(count + 5, "left") == whole
    assert kept(3, "") == [1, whole[-2], 2]
    assert kept(2, "left") == whole[-2:]
    assert kept(2, "right") == whole[:2]
    assert kept(0, "left") == []
    with pytest.raises(TruncationError):
        kept(2, "")


def test_between_pieces_it_may_be_given_up() -> None:
    class OverError(Exception):
        pass

    left = 3

    def check() -> None:
        nonlocal left
        left -= 1
        if not left:
            raise OverError

    cache = PieceCache(1 << 20, b"k")
    with pytest.raises(OverError):
        Encoder(Tokenizer.from_file(str(TOKENIZER)), cache, b"1", TURN).encode(conversation(9), special=False, check=check)
    assert len(cache) == 2, "what was done stays"


# The cache


def test_a_cache_holds_so_many_bytes_and_forgets_what_was_not_asked_for() -> None:
    ids = bytes(40)
    cache = PieceCache(8 * (len(ids) + ENTRY_BYTES), b"k")
    keys = [cache.key(b"1", bytes([number])) for number in range(9)]
    for key in keys[:8]:
        cache.put(key, ids)
    assert (len(cache), cache.bytes) == (8, cache.bytes_max)
    assert cache.get(keys[0]) == ids
    cache.put(keys[8], ids)
    assert (len(cache), cache.bytes) == (8, cache.bytes_max)
    assert cache.get(keys[1]) is None
    assert cache.get(keys[0]) == ids
    cache.put(keys[8], bytes(80))
    assert cache.bytes <= cache.bytes_max
    cache.put(b"huge", bytes(cache.bytes_max // 4))
    assert cache.get(b"huge") is None, "one text does not take everyone's place"
    assert cache.bytes == sum(len(found) + ENTRY_BYTES for found in cache._found.values())


def test_a_cache_of_no_bytes_holds_nothing() -> None:
    cache = PieceCache(0, b"k")
    cache.put(b"k", b"")
    assert (len(cache), cache.bytes) == (0, 0)


def test_what_a_key_depends_on() -> None:
    cache = PieceCache(0, b"k")
    assert len({cache.key(b"1", b"x"), cache.key(b"2", b"x"), cache.key(b"1", b"y"), PieceCache(0, b"l").key(b"1", b"x")}) == 4
    assert cache.key(b"1", b"x") == PieceCache(9, b"k").key(b"1", b"x")
