"""vLLM's block-outermost layouts: a block with the pages of all its layers is one piece to copy, and the bytes are right."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]  # vLLM's import warns

LAST_PLACES = 1e-5  # as in test_answers.py
STEPS = {
    "tiny": [f"{step} {how}" for step in ("whole", "255", "1024", "1025", "two at once") for how in ("cold", "warm")],
    "hybrid": ["long answer cold", "long answer warm", "prefix", "extension", "two at once warm"],
}


@pytest.mark.parametrize(("model", "layers", "pieces"), [("tiny", 2, 1), ("hybrid", 6, 3)])
def test_an_engine_that_was_asked_for_them_answers_as_one_without_kvkeep(runs, model, layers, pieces):
    keep, plain = runs(f"{model}-across"), runs(f"{model}-plain")
    assert (keep.facts["layout"], plain.facts["layout"]) == ("BLHNC", "LBHNC")
    assert len(keep.facts["ranges"]) == pieces
    assert len(runs(model).facts["ranges"]) == layers
    for step in STEPS[model]:
        for ours, theirs in zip(keep.answers(step), plain.answers(step), strict=True):
            assert ours["tokens"] == theirs["tokens"], step
            assert ours["logprobs"] == pytest.approx(theirs["logprobs"], rel=0, abs=LAST_PLACES), step
        assert keep.external(step) == runs(model).external(step), step
    assert any(keep.external(step) for step in STEPS[model])


def test_a_backend_without_them_goes_on_with_what_it_has(runs):
    keep = runs("asked-in-vain")
    assert keep.facts["layout"] == "LBHNC"
    assert len(keep.facts["ranges"]) == 2
    assert keep.external("whole warm") == 512


def test_where_loads_go_by_layer_its_layers_stay_apart(runs):
    keep = runs("outermost-by-layer")
    assert keep.facts["layout"] == "BLHNC"
    assert len(keep.facts["ranges"]) == 2
    assert keep.external("whole warm") == 512
    assert keep.answers("whole warm")[0]["tokens"] == runs("tiny-plain").answers("whole warm")[0]["tokens"]


def test_chunks_of_joined_layers_never_meet_those_of_layers_apart():
    import torch

    from kvkeep.core.layout import GroupLayout, LayerLayout, ShardLayout
    from kvkeep.doors.vllm.identity import worker_facts

    config = SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context={}))
    caches = {name: torch.zeros(5, 2, 16, 16) for name in ("l0", "l1")}
    apart = tuple(LayerLayout(name, (2048,)) for name in caches)
    joined = (LayerLayout("l0 to l1", (4096,)),)
    shapes = [
        worker_facts(config, caches, ShardLayout(16, (GroupLayout(16, 0, layers),)))["page_shapes"]
        for layers in (apart, joined)
    ]
    assert shapes[0] != shapes[1]


@pytest.mark.parametrize(
    ("settings", "layout"),
    [
        ({}, None),
        ({"cross_layer_blocks": True}, "BLHNC"),
        ({"cross_layer_blocks": True, "transfer_mode": "bulk"}, "BLHNC"),
        ({"cross_layer_blocks": True, "transfer_mode": "layerwise"}, None),
    ],
)
def test_vllm_is_asked_for_them_where_that_is_set_and_no_load_goes_by_layer(settings, layout):
    from kvkeep.doors.vllm.connector import KVKeepConnector

    config = SimpleNamespace(kv_transfer_config=SimpleNamespace(kv_connector_extra_config=settings))
    assert KVKeepConnector.get_required_kvcache_layout(config) == layout


@pytest.mark.parametrize("name", ["BLHNC", "BLNHC", "BHLNC", "LBHNC", "LBNHC"])
def test_the_views_that_vllm_makes_of_a_layout_are_recognised(name):
    import torch
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheLayout, KVCacheTensor, create_kv_cache_views

    from kvkeep.transfer.pages import GroupCaches, across_layers, group_rows

    layout, blocks, layers = KVCacheLayout[name], 5, ["l0", "l1", "l2"]
    spec = FullAttentionSpec(block_size=16, num_kv_heads=2, head_size=8, dtype=torch.float32)
    page, outermost = spec.page_size_bytes, layout.is_block_outermost
    strides = (page, page * len(layers)) if outermost else (page * blocks, page)
    if name == "BHLNC":  # a block's heads, in each of them the layers
        strides = (page // spec.num_heads, page * len(layers))
    raw = torch.arange(page * blocks * len(layers) // 4, dtype=torch.int32).view(torch.int8)
    tensor = KVCacheTensor(size=raw.numel(), layers=layers, layer_stride=strides[0], block_stride=strides[1])
    views = create_kv_cache_views(raw, spec, blocks, layout, tensor)
    group = across_layers(GroupCaches(dict(zip(layers, views, strict=True)), blocks, 16, 0))
    assert list(group.caches) == (["l0 to l2"] if outermost else layers)
    if outermost:
        ((rows,),) = group_rows(group)
        assert np.array_equal(rows.numpy().view(np.int8), raw.numpy().reshape(blocks, -1))
