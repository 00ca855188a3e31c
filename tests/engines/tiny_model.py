"""A Llama with random weights, its tokenizer and two LoRA adapters, made on the spot: no hub, no download. Run by an engine's Python.

    python tiny_model.py DIRECTORY LAYERS HIDDEN

The adapters `sql` and `chat` (rank 8, on the query and value projections) go to DIRECTORY-sql and DIRECTORY-chat.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"

import torch
from safetensors.torch import save_file
from tiny_tokenizer import BOS, EOS, PAD, TEMPLATE, TOKENS, TURN_END, TURN_START, trained
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HEAD_SIZE = 32
"""The smallest that vLLM's attention on CPUs takes."""
RANK = 8
ADAPTERS = ("sql", "chat")


def save_tokenizer(directory: Path) -> None:
    fast = PreTrainedTokenizerFast(
        tokenizer_object=trained(),
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=[TURN_START, TURN_END],
    )
    fast.chat_template = TEMPLATE
    fast.save_pretrained(directory)


def save_model(directory: Path, layers: int, hidden: int) -> LlamaConfig:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=TOKENS,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=max(1, hidden // HEAD_SIZE),
        num_key_value_heads=max(1, hidden // HEAD_SIZE // 2),
        head_dim=HEAD_SIZE,
        max_position_embeddings=8_192,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    return config


def save_adapter(directory: Path, base: Path, config: LlamaConfig) -> None:
    """The two files that an adapter of PEFT is."""
    rows = {"q_proj": config.num_attention_heads * HEAD_SIZE, "v_proj": config.num_key_value_heads * HEAD_SIZE}
    weights = {}
    for layer in range(config.num_hidden_layers):
        for projection, size in rows.items():
            name = f"base_model.model.model.layers.{layer}.self_attn.{projection}"
            weights[f"{name}.lora_A.weight"] = torch.randn(RANK, config.hidden_size, dtype=torch.bfloat16) * 0.02
            weights[f"{name}.lora_B.weight"] = torch.randn(size, RANK, dtype=torch.bfloat16) * 0.02
    directory.mkdir(parents=True, exist_ok=True)
    save_file(weights, directory / "adapter_model.safetensors")
    about = {
        "base_model_name_or_path": str(base), "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 2 * RANK,
        "lora_dropout": 0.0, "bias": "none", "target_modules": sorted(rows), "fan_in_fan_out": False, "inference_mode": True,
        "modules_to_save": None,
    }  # fmt: skip
    (directory / "adapter_config.json").write_text(json.dumps(about))


def main(directory: Path, layers: int, hidden: int) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    save_tokenizer(directory)
    config = save_model(directory, layers, hidden)
    for adapter in ADAPTERS:
        save_adapter(directory.with_name(f"{directory.name}-{adapter}"), directory, config)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
