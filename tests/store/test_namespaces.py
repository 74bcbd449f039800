from __future__ import annotations

from kvkeep.store.namespaces import MAX_IDENTITY_CHARS, MOST, Named, Namespaces

A, B, C = (bytes([n]) * 16 for n in range(3))
BF16, FP8 = "model     'm'\nkv_dtype  'bfloat16'", "model     'm'\nkv_dtype  'fp8'"


def test_a_new_namespace_is_told_apart_from_the_latest_of_its_name():
    names = Namespaces()
    assert names.name(A, "vllm m", BF16) == []
    assert names.name(C, "library m", "kv_dtype  'float32'") == []
    assert names.name(B, "vllm m", FP8) == ["kv_dtype: 'fp8' here, 'bfloat16' there"]


def test_one_that_is_known_is_no_news_and_becomes_the_latest():
    names = Namespaces()
    names.name(A, "vllm m", BF16)
    names.name(B, "vllm m", FP8)
    assert names.name(A, "vllm m", BF16) == []
    assert list(names.known) == [B, A]


def test_what_was_known_in_an_earlier_life_tells_a_new_one_apart():
    names = Namespaces()
    names.name(B, "vllm m", FP8)
    names.name(C, "library m", FP8)
    assert names.recall({A: Named("vllm m", BF16)}) == ["kv_dtype: 'fp8' here, 'bfloat16' there"]
    assert list(names.known) == [A, B, C]
    assert names.recall({A: Named("vllm m", "older"), B: Named("vllm m", FP8)}) == []
    assert names.known[A].identity == BF16


def test_who_listens_is_told_of_new_ones_only():
    names, heard = Namespaces(), []
    names.changed = lambda: heard.append(list(names.known))
    for one in (A, A, B, A):
        names.name(one, "vllm m", BF16)
    assert heard == [[A], [A, B]]


def test_what_is_kept_is_bounded():
    names = Namespaces()
    for n in range(2 * MOST):
        names.name(n.to_bytes(16, "big"), "vllm m", "x" * (2 * MAX_IDENTITY_CHARS))
    names.recall({A: Named("vllm m", BF16)})
    assert list(names.known) == [n.to_bytes(16, "big") for n in range(MOST, 2 * MOST)]
    assert {len(one.identity) for one in names.known.values()} == {MAX_IDENTITY_CHARS}
