"""The same kind of model as tiny_model.py makes, as the one file llama.cpp reads: a Llama with random weights and its tokenizer.

    python tiny_gguf.py FILE LAYERS HIDDEN

Needs `gguf` and `tokenizers`: no PyTorch, and so no engine's environment.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import gguf
import numpy as np
from tiny_tokenizer import BOS, EOS, PAD, SPECIAL, TEMPLATE, TOKENS, trained

HEAD_SIZE = 32
CONTEXT_TOKENS = 8_192
NORM_EPSILON = 1e-6
ROPE_BASE = 10_000.0
SPREAD = 0.02
"""Standard deviation of the weights, as transformers begins with."""


def add_about(writer: gguf.GGUFWriter, layers: int, hidden: int) -> None:
    heads = max(1, hidden // HEAD_SIZE)
    writer.add_name("tiny")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_context_length(CONTEXT_TOKENS)
    writer.add_vocab_size(TOKENS)
    writer.add_block_count(layers)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(2 * hidden)
    writer.add_head_count(heads)
    writer.add_head_count_kv(max(1, heads // 2))
    writer.add_key_length(HEAD_SIZE)
    writer.add_value_length(HEAD_SIZE)
    writer.add_rope_dimension_count(HEAD_SIZE)
    writer.add_rope_freq_base(ROPE_BASE)
    writer.add_layer_norm_rms_eps(NORM_EPSILON)


def add_tokenizer(writer: gguf.GGUFWriter) -> None:
    bpe = json.loads(trained().to_str())["model"]
    tokens = sorted(bpe["vocab"], key=bpe["vocab"].__getitem__)
    assert len(tokens) == TOKENS, len(tokens)
    writer.add_tokenizer_model("gpt2")  # what GGUF calls byte-level BPE
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL if token in SPECIAL else gguf.TokenType.NORMAL for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in bpe["merges"]])
    writer.add_bos_token_id(SPECIAL.index(BOS))
    writer.add_eos_token_id(SPECIAL.index(EOS))
    writer.add_pad_token_id(SPECIAL.index(PAD))
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)


def add_weights(writer: gguf.GGUFWriter, layers: int, hidden: int) -> None:
    random = np.random.default_rng(0)
    query, key_value = (size * HEAD_SIZE for size in (max(1, hidden // HEAD_SIZE), max(1, hidden // HEAD_SIZE // 2)))

    def matrix(name: str, rows: int, columns: int) -> None:
        writer.add_tensor(f"{name}.weight", (SPREAD * random.standard_normal((rows, columns), np.float32)).astype(np.float16))

    def norm(name: str) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(hidden, np.float32))

    matrix("token_embd", TOKENS, hidden)
    for layer in range(layers):
        block = f"blk.{layer}"
        norm(f"{block}.attn_norm")
        matrix(f"{block}.attn_q", query, hidden)
        matrix(f"{block}.attn_k", key_value, hidden)
        matrix(f"{block}.attn_v", key_value, hidden)
        matrix(f"{block}.attn_output", hidden, query)
        norm(f"{block}.ffn_norm")
        matrix(f"{block}.ffn_gate", 2 * hidden, hidden)
        matrix(f"{block}.ffn_up", 2 * hidden, hidden)
        matrix(f"{block}.ffn_down", hidden, 2 * hidden)
    norm("output_norm")
    matrix("output", TOKENS, hidden)


def main(file: Path, layers: int, hidden: int) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(file, "llama")
    add_about(writer, layers, hidden)
    add_tokenizer(writer)
    add_weights(writer, layers, hidden)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
