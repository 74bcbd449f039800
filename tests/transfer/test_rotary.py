from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.gptj.modeling_gptj import rotate_every_two
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, rotate_half

from kvkeep.errors import LayoutMismatch
from kvkeep.transfer.rope.frequencies import Span, frequencies
from kvkeep.transfer.rope.rotate import Pairing, Rotation, key_pages, rotate, rotate_blocks, rotation_between

HEAD = 64
MODEL = 512
PARAMETERS: dict[str, dict[str, object]] = {
    "default": {"rope_type": "default", "rope_theta": 10_000.0},
    "partial": {"rope_type": "default", "rope_theta": 500_000.0, "partial_rotary_factor": 0.5},
    "linear": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0},
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 1_000_000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 128,
    },
    "yarn, deepseek": {
        "rope_type": "yarn",
        "rope_theta": 10_000.0,
        "factor": 40.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 16,
        "beta_slow": 2,
        "mscale": 1.0,
        "mscale_all_dim": 0.7,
        "truncate": False,
    },
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    },
}


def config(parameters: Mapping[str, object]) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=101,
        hidden_size=2 * HEAD,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=HEAD,
        max_position_embeddings=MODEL,
        rope_parameters=dict(parameters),
    )


def theirs(parameters: Mapping[str, object], length: int) -> tuple[torch.Tensor, float]:
    """The frequencies and the attention scaling of transformers itself."""
    if parameters["rope_type"] == "default":
        share = parameters.get("partial_rotary_factor", 1.0)
        made = config(parameters)
        made.head_dim = int(HEAD * float(str(share)))
        return LlamaRotaryEmbedding.compute_default_rope_parameters(made)
    return ROPE_INIT_FUNCTIONS[str(parameters["rope_type"])](config(parameters), torch.device("cpu"), seq_len=length)


def computed_at(
    keys: torch.Tensor, positions: torch.Tensor, pace: torch.Tensor, scale: float, interleaved: bool
) -> torch.Tensor:
    """K [tokens, heads, head_size] as a model computes it at these positions, by transformers' own rotation."""
    angles = positions.float()[:, None] * pace[None]
    spread = angles.repeat_interleave(2, -1) if interleaved else torch.cat((angles, angles), -1)
    cos, sin = (spread.cos() * scale)[:, None], (spread.sin() * scale)[:, None]
    rotated, rest = keys[..., : 2 * len(pace)], keys[..., 2 * len(pace) :]
    other = rotate_every_two(rotated[None])[0] if interleaved else rotate_half(rotated)
    return torch.cat((rotated * cos + other * sin, rest), -1)


def some_keys(tokens: int, heads: int, seed: int = 0, head_size: int = HEAD) -> torch.Tensor:
    return torch.randn((tokens, heads, head_size), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("length", [3, MODEL, 3 * MODEL])
@pytest.mark.parametrize("name", PARAMETERS)
def test_frequencies_are_those_of_transformers(name: str, length: int):
    parameters = PARAMETERS[name]
    wanted, _ = theirs(parameters, length)
    torch.testing.assert_close(frequencies(parameters, HEAD, Span(MODEL, length)), wanted, rtol=2e-6, atol=0)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("name", PARAMETERS)
def test_moved_keys_are_those_computed_there(name: str, interleaved: bool):
    parameters = PARAMETERS[name]
    pace, scale = theirs(parameters, 2 * MODEL)
    keys, p, q = some_keys(40, 3), torch.arange(7, 47), torch.arange(460, 500)
    mine = frequencies(parameters, HEAD, Span(MODEL, 2 * MODEL))
    moved = rotate(
        computed_at(keys, p, pace, scale, interleaved), rotation_between((p, mine), (q, mine)), Pairing(interleaved)
    )
    wanted = computed_at(keys, q, pace, scale, interleaved)
    torch.testing.assert_close(moved, wanted, rtol=0, atol=1e-4)
    assert (moved - computed_at(keys, q + 1, pace, scale, interleaved)).abs().max() > 0.1, "any position would do"
    if name.startswith("yarn"):
        assert scale != 1.0, "nothing cancels"


def test_a_length_that_changes_the_frequencies_is_followed():
    parameters = PARAMETERS["dynamic"]
    keys, p, q = some_keys(8, 1), torch.arange(8), torch.arange(900, 908)
    short, long = (frequencies(parameters, HEAD, Span(MODEL, length)) for length in (MODEL, 2 * MODEL))
    assert not torch.equal(short, long)
    moved = rotate(computed_at(keys, p, short, 1.0, False), rotation_between((p, short), (q, long)), Pairing())
    torch.testing.assert_close(moved, computed_at(keys, q, long, 1.0, False), rtol=0, atol=1e-4)


@settings(max_examples=60, deadline=None)
@given(
    positions=st.tuples(st.integers(0, 131_072), st.integers(0, 131_072)),
    head=st.sampled_from([2, 6, 64, 80, 128]),
    interleaved=st.booleans(),
    seed=st.integers(0, 99),
)
def test_moving_equals_computing_there_whatever_the_positions(
    positions: tuple[int, int], head: int, interleaved: bool, seed: int
):
    pace = frequencies(PARAMETERS["default"], head, Span(MODEL))
    p, q = (torch.arange(first, first + 3) for first in positions)
    keys = some_keys(3, 2, seed, head)
    moved = rotate(
        computed_at(keys, p, pace, 1.0, interleaved), rotation_between((p, pace), (q, pace)), Pairing(interleaved)
    )
    torch.testing.assert_close(moved, computed_at(keys, q, pace, 1.0, interleaved), rtol=0, atol=2e-5)


@settings(max_examples=60, deadline=None)
@given(
    positions=st.tuples(st.integers(0, 131_072), st.integers(0, 131_072)),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
    interleaved=st.booleans(),
    seed=st.integers(0, 99),
)
def test_there_and_back_is_within_two_roundings(
    positions: tuple[int, int], dtype: torch.dtype, interleaved: bool, seed: int
):
    pace = frequencies(PARAMETERS["llama3"], HEAD, Span(MODEL))
    p, q = (torch.arange(first, first + 3) for first in positions)
    keys = some_keys(3, 2, seed).to(dtype)
    there = rotate(keys, rotation_between((p, pace), (q, pace)), Pairing(interleaved))
    back = rotate(there, rotation_between((q, pace), (p, pace)), Pairing(interleaved))
    # each rounding moves a number by half a unit in its last place; a turn mixes the two of a pair
    split = back.float().unflatten(-1, (-1, 2) if interleaved else (2, -1))
    length = split.norm(dim=-1 if interleaved else -2, keepdim=True).expand_as(split).flatten(-2)
    assert ((back.float() - keys.float()).abs() <= 1.5 * torch.finfo(dtype).eps * length).all()


def test_nothing_moves_by_nothing_and_a_partial_rotary_leaves_the_rest_bit_for_bit():
    keys = some_keys(5, 2).to(torch.bfloat16)
    keys[..., HEAD // 2 :] = float("nan")
    pace = frequencies(PARAMETERS["partial"], HEAD, Span(MODEL))
    assert len(pace) == HEAD // 4
    p = torch.arange(5)
    moved = rotate(keys, rotation_between((p, pace), (p + 9, pace)), Pairing())
    assert torch.equal(moved[..., HEAD // 2 :].view(torch.int16), keys[..., HEAD // 2 :].view(torch.int16))
    assert not torch.equal(moved[..., : HEAD // 2], keys[..., : HEAD // 2])
    same = rotate(keys, rotation_between((p, pace), (p, pace)), Pairing())
    assert torch.equal(same.view(torch.int16), keys.view(torch.int16))


LAYOUTS = {
    "2bthd": lambda keys, values: torch.stack((keys, values)),
    "b2thd": lambda keys, values: torch.stack((keys, values), 1),
    "b2htd": lambda keys, values: torch.stack((keys, values), 1).permute(0, 1, 3, 2, 4).contiguous(),
    "bthd": lambda keys, _values: keys.clone(),
}


@pytest.mark.parametrize("axes", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("interleaved", [False, True])
def test_only_k_of_the_named_blocks_turns(axes: str, dtype: torch.dtype, interleaved: bool):
    keys, values = (some_keys(7 * 4, 3, seed, 24).to(dtype).unflatten(0, (7, 4)) for seed in (1, 2))
    cache = LAYOUTS[axes](keys, values)
    pages = key_pages("l", cache, axes)
    assert torch.equal(pages, keys)
    assert "2" not in axes or torch.equal(key_pages("l", cache, axes, half=1), values)
    assert pages.untyped_storage().data_ptr() == cache.untyped_storage().data_ptr()
    pace = frequencies(PARAMETERS["partial"], 24, Span(MODEL))
    p, ids = torch.arange(12), [5, 1, 3]
    rotation, pairing = rotation_between((p, pace), (p + 100, pace)), Pairing(interleaved)
    rotate_blocks(pages, ids, rotation, pairing)
    wanted = keys.clone()
    wanted[ids] = rotate(keys[ids].flatten(0, 1).float(), rotation, pairing).to(dtype).unflatten(0, (3, 4))
    assert torch.equal(cache, LAYOUTS[axes](wanted, values))


def test_no_block_is_nothing_to_do():
    pages = some_keys(8, 1).unflatten(0, (2, 4))
    before = pages.clone()
    rotate_blocks(pages, [], Rotation(torch.ones(0, 4), torch.zeros(0, 4)), Pairing())
    assert torch.equal(pages, before)


def test_mla_turns_behind_its_latent():
    cache = some_keys(6, 1, head_size=24).reshape(3, 2, 24)
    before = cache.clone()
    pace = frequencies(PARAMETERS["default"], 8, Span(MODEL))
    p = torch.arange(2)
    rotation = rotation_between((p, pace), (p + 3, pace))
    rotate_blocks(key_pages("l", cache, "btd"), [2], rotation, Pairing(interleaved=True, start=16))
    assert torch.equal(cache[:2], before[:2])
    assert torch.equal(cache[2, :, :16], before[2, :, :16])
    torch.testing.assert_close(
        cache[2, :, None, 16:], computed_at(before[2, :, None, 16:], torch.tensor([3, 3]), pace, 1.0, True)
    )


@pytest.mark.parametrize(
    ("parameters", "says"),
    [
        ({"rope_type": "longrope", "rope_theta": 1.0}, "kind 'longrope' is not known"),
        ({"type": "su", "rope_theta": 1.0}, "kind 'su' is not known"),
        ({"rope_type": "default", "rope_theta": 1.0, "mrope_section": [8, 12, 12]}, "'mrope_section' of default"),
        ({"rope_type": "dynamic", "rope_theta": 1.0, "alpha": 1000.0}, "'alpha' of dynamic"),
        ({"rope_type": "linear", "rope_theta": 1.0}, "no factor"),
        ({"rope_type": "default"}, "no rope_theta"),
        ({"rope_type": "dynamic", "rope_theta": 1.0, "factor": 2.0}, "depends on the length"),
    ],
)
def test_what_is_not_known_is_refused_by_name(parameters: dict[str, object], says: str):
    with pytest.raises(LayoutMismatch, match=says):
        frequencies(parameters, HEAD, Span(MODEL))


@pytest.mark.parametrize(
    ("shape", "dtype", "axes", "packed", "says"),
    [
        ((3, 2, 4, 8), torch.bfloat16, "bthd", "AMX", "l: K cannot be moved: AMX packs its bytes"),
        ((3, 2, 4, 8), torch.float8_e4m3fn, "bthd", "", "l: K cannot be moved: torch.float8_e4m3fn"),
        ((3, 2, 4, 8), torch.uint8, "bthd", "", "torch.uint8"),
        ((3, 2, 4, 8), torch.float32, "2bthd", "", "do not describe shape"),
        ((3, 2, 4, 8), torch.float32, "bthx", "", "do not describe shape"),
        ((3, 2, 4, 8), torch.float32, "bthh", "", "do not describe shape"),
    ],
)
def test_a_cache_whose_k_cannot_be_turned_is_refused(
    shape: tuple[int, ...], dtype: torch.dtype, axes: str, packed: str, says: str
):
    with pytest.raises(LayoutMismatch, match=says):
        key_pages("l", torch.zeros(shape, dtype=torch.float32).to(dtype), axes, packed)


def test_more_pairs_than_a_head_has_are_refused():
    with pytest.raises(LayoutMismatch, match="do not fit"):
        rotate(some_keys(1, 1), Rotation(torch.ones(1, 30), torch.zeros(1, 30)), Pairing(start=8))


@pytest.mark.parametrize("name", [name for name in PARAMETERS if name not in ("partial", "dynamic")])
def test_a_whole_model_attends_to_a_moved_chunk_as_to_one_computed_there(name: str):
    """Nothing precedes the chunk, so its hidden states are the same wherever it stands."""
    torch.manual_seed(5)
    model = LlamaForCausalLM(config(PARAMETERS[name])).eval()
    tokens = torch.randint(0, 101, (1, 24))
    question = torch.randint(0, 101, (1, 5))
    p, q = 3, 200

    def answer(cache: DynamicCache) -> torch.Tensor:
        positions = torch.arange(q + 24, q + 29)[None]
        return model(question, past_key_values=cache, position_ids=positions).logits

    def chunk_at(position: int) -> DynamicCache:
        cache = DynamicCache(config=model.config)
        model(tokens, past_key_values=cache, position_ids=torch.arange(position, position + 24)[None])
        return cache

    with torch.no_grad():
        there, moved, left = chunk_at(q), chunk_at(p), chunk_at(p)
        pace = frequencies(PARAMETERS[name], HEAD, Span(MODEL))
        rotation = rotation_between((torch.arange(p, p + 24), pace), (torch.arange(q, q + 24), pace))
        for mine, wanted in zip(moved.layers, there.layers, strict=True):
            keys = mine.keys[0].transpose(0, 1)  # tokens, heads, head_size
            mine.keys = rotate(keys, rotation, Pairing()).transpose(0, 1)[None]
            torch.testing.assert_close(mine.keys, wanted.keys, rtol=0, atol=1e-4)
            torch.testing.assert_close(mine.values, wanted.values, rtol=0, atol=1e-5)
        wanted_logits, logits = answer(there), answer(moved)
        torch.testing.assert_close(logits, wanted_logits, rtol=0, atol=1e-5)
        assert (answer(left) - wanted_logits).abs().max() > 100 * (logits - wanted_logits).abs().max()
