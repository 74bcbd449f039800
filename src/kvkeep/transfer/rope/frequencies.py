"""How fast RoPE rotates the pairs of a head: the frequencies of each scaling that is known; all others are refused.

Sources: RoFormer (Su et al. 2021), position interpolation (Chen et al. 2023), dynamic NTK (bloc97, emozilla 2023),
YaRN (Peng et al. 2023), Llama 3.1's model card. What scales the length of K (YaRN's attention factor) is the same at
every position and cancels when K is moved, so it is no part of this. Knows nothing about keys, caches or copies.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple, SupportsFloat, cast

import torch

from kvkeep.errors import LayoutMismatch

_ALWAYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
_CANCEL = {"attention_factor", "attn_factor", "mscale", "mscale_all_dim"}  # they scale K, wherever it is


class Span(NamedTuple):
    """How long texts may get: what the model was made for, and (dynamic NTK only) the length that was computed with.

    `computed` differs between engines: transformers takes the longest length so far, vLLM `model` times the factor.
    """

    model: int
    computed: int = 0


class _Rope(NamedTuple):
    parameters: Mapping[str, object]
    pairs: int
    span: Span

    def value(self, name: str, default: float | None = None) -> float:
        given = self.parameters.get(name)
        if given is None:
            given = default
        if given is None:
            raise LayoutMismatch(f"K cannot be moved: the RoPE parameters have no {name}")
        return float(cast(SupportsFloat, given))

    def plain(self, base: float) -> torch.Tensor:
        """One full circle in `base` ** (pair / pairs) tokens and two pi, float32 [pairs]."""
        dims = torch.arange(0, 2 * self.pairs, 2, dtype=torch.float32)
        return cast(torch.Tensor, 1.0 / base ** (dims / (2 * self.pairs)))

    @property
    def base(self) -> float:
        return self.value("rope_theta")


def frequencies(parameters: Mapping[str, object], head_size: int, span: Span) -> torch.Tensor:
    """The angle (radians) by which each pair rotates from one token to the next: float32 [pairs], on the CPU.

    `parameters` are a model's own `rope_parameters`. LayoutMismatch, naming it, for a kind or a parameter that is not
    known here: a guess would be wrong answers without an error.
    """
    kind = str(parameters.get("rope_type") or parameters.get("type") or "default")
    if kind not in _KINDS:
        raise LayoutMismatch(f"K cannot be moved: RoPE of kind {kind!r} is not known (known: {', '.join(_KINDS)})")
    known, compute = _KINDS[kind]
    for name, value in parameters.items():
        if name not in known | _ALWAYS and value is not None:
            raise LayoutMismatch(f"K cannot be moved: parameter {name!r} of {kind} RoPE is not known")
    share = float(cast(SupportsFloat, parameters.get("partial_rotary_factor") or 1.0))
    return compute(_Rope(parameters, int(head_size * share) // 2, span))


def _default(rope: _Rope) -> torch.Tensor:
    return rope.plain(rope.base)


def _linear(rope: _Rope) -> torch.Tensor:
    return rope.plain(rope.base) / rope.value("factor")


def _dynamic(rope: _Rope) -> torch.Tensor:
    """The base grows with the text, so K of one text moves only from the length it was computed with to another."""
    factor, dim = rope.value("factor"), 2 * rope.pairs
    if not rope.span.computed:
        raise LayoutMismatch("K cannot be moved: dynamic RoPE depends on the length that was computed with")
    longer = max(rope.span.computed, rope.span.model) / rope.span.model
    return rope.plain(rope.base * (factor * longer - (factor - 1)) ** (dim / (dim - 2)))


def _yarn(rope: _Rope) -> torch.Tensor:
    """Pairs that rotate fast keep their pace, slow ones are slowed by `factor`, a ramp lies between."""
    original = rope.value("original_max_position_embeddings", rope.span.model)
    factor = rope.value("factor", rope.span.model / original)

    def pair_of(circles: float) -> float:
        """The (fractional) pair that makes so many full circles in the original length."""
        return rope.pairs * math.log(original / (circles * 2 * math.pi)) / math.log(rope.base)

    low, high = pair_of(rope.value("beta_fast", 32)), pair_of(rope.value("beta_slow", 1))
    if rope.parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * rope.pairs - 1)
    ramp = (torch.arange(rope.pairs, dtype=torch.float32) - low) / (high - low or 0.001)
    slowed = ramp.clamp(0, 1)
    plain = rope.plain(rope.base)
    return plain / factor * slowed + plain * (1 - slowed)


def _llama3(rope: _Rope) -> torch.Tensor:
    """Long waves are slowed by `factor`, short ones not, those between in proportion."""
    low, high = rope.value("low_freq_factor"), rope.value("high_freq_factor")
    plain = rope.plain(rope.base)
    waves = rope.value("original_max_position_embeddings") * plain / (2 * math.pi)  # in the original length
    kept = ((waves - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * plain / rope.value("factor") + kept * plain


_KINDS: dict[str, tuple[set[str], Callable[[_Rope], torch.Tensor]]] = {
    "default": (set(), _default),
    "linear": ({"factor"}, _linear),
    "dynamic": ({"factor"}, _dynamic),
    "yarn": (
        {"factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "truncate", *_CANCEL},
        _yarn,
    ),
    "llama3": ({"factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"}, _llama3),
}
