"""Makes a random LFM2 (short convolutions beside attention), a kind of model that kvkeep refuses.

`make_lfm2.py FOLDER LIKE`; LIKE is a model's folder whose tokenizer it takes.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch
from transformers import Lfm2Config, Lfm2ForCausalLM

VLLM_ASKS_FOR = {"conv_dim": 128, "block_dim": 128, "block_ff_dim": 256}
"""Fields of LFM2's published configurations that transformers does not write."""


def main(folder: Path, like: Path) -> None:
    """Writes it."""
    config = Lfm2Config(
        vocab_size=1024,
        hidden_size=128,
        intermediate_size=256,
        block_auto_adjust_ff_dim=False,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        layer_types=["conv", "full_attention", "conv", "full_attention"],
        bos_token_id=256,
        eos_token_id=257,
        pad_token_id=258,
    )
    torch.manual_seed(0)
    Lfm2ForCausalLM(config).to(torch.float32).save_pretrained(folder)
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**written, **VLLM_ASKS_FOR}))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(like / name, folder / name)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
