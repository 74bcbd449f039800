from __future__ import annotations

import pytest

from kvkeep.core.allocator import FreeList
from kvkeep.core.index import Index
from kvkeep.core.policies.queue import lru
from kvkeep.store.namespaces import MAX_IDENTITY_NBYTES, MAX_NAME_CHARS, MOST, Named, Namespaces, plain_identity
from kvkeep.store.openings import Opening
from kvkeep.store.store import Store

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
        names.name(n.to_bytes(16, "big"), "vllm m", "x" * (2 * MAX_IDENTITY_NBYTES))
    names.recall({A: Named("vllm m", BF16)})
    assert list(names.known) == [n.to_bytes(16, "big") for n in range(MOST, 2 * MOST)]
    assert {len(one.identity) for one in names.known.values()} == {MAX_IDENTITY_NBYTES}


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("a\nb", r"a\nb"),
        ("\x1b[31mred", r"\x1b[31mred"),
        ("\u202egnol\x00\x9b", r"\u202egnol\x00\x9b"),
        ("\ud800", r"\ud800"),
        ("größe 模型 [/x]", "größe 模型 [/x]"),
        ("\x1b" * 300, r"\x1b" * (MAX_NAME_CHARS // 4)),
        ("模" * 300, "模" * MAX_NAME_CHARS),
    ],
)
def test_a_name_is_one_line_that_no_terminal_obeys(said: str, shown: str) -> None:
    store = Store(Index(FreeList(4096), lru()), 4096)
    assert store.open(Opening(said, A, "", 4096, holders=())).opening.name == shown
    names = Namespaces()
    names.name(A, said, "")
    assert names.known[A].name == shown
    names = Namespaces()
    names.recall({A: Named(said, "")})
    assert names.known[A].name == shown
    names.recall({B: names.known[A]})
    assert names.known[B].name == shown, "what is plain stays as it is"


@pytest.mark.parametrize("char", ["x", "é", "模", "😀", "\x1b", "\\"])
def test_an_identity_keeps_its_lines_and_is_cut_in_bytes(char: str) -> None:
    said = "model  'm'\n" + char * (2 * MAX_IDENTITY_NBYTES)
    shown = plain_identity(said)
    assert shown.startswith("model  'm'\n")
    assert shown.replace("\n", "").isprintable()
    assert MAX_IDENTITY_NBYTES - 4 < len(shown.encode()) <= MAX_IDENTITY_NBYTES
    store, names, again = Store(Index(FreeList(4096), lru()), 4096), Namespaces(), Namespaces()
    names.name(A, "m", said)
    again.recall({A: Named("m", said)})
    assert names.known[A].identity == again.known[A].identity == shown == plain_identity(shown)
    assert store.open(Opening("m", A, said, 4096, holders=())).opening.identity == shown


def test_one_that_is_told_apart_is_of_the_same_name_as_it_is_shown() -> None:
    names = Namespaces()
    names.name(A, "m\n", BF16)
    assert names.name(B, "m\n", FP8) == ["kv_dtype: 'fp8' here, 'bfloat16' there"]
