"""The tokenizer of the models made here: a byte-level BPE of 2 048 tokens, trained on Python's own library, so it is the same wherever that is.

Run by an engine's Python; needs nothing but `tokenizers`.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

TOKENS = 2_048
PAD, BOS, EOS, TURN_START, TURN_END = SPECIAL = ("<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")
"""In the order of their ids, from 0."""
TRAINING_FILES = 100
TURN = "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
TEMPLATE = "{% for m in messages %}" + TURN + "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"


def trained() -> Tokenizer:
    library = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:TRAINING_FILES]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENS,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((file.read_text(errors="ignore") for file in library), trainer)
    return tokenizer
