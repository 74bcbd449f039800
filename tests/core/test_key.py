from __future__ import annotations

import subprocess
import sys
from array import array
from hashlib import sha256
from typing import Any

import cbor2
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvkeep.core import cbor
from kvkeep.core.key import BlockChain, BlockHashes, Chain, key_of, mixed_root, none_hash, token_array

UINTS = st.one_of(
    st.integers(0, 30), st.integers(0, 300), st.integers(0, 70_000), st.integers(0, 2**32 - 1),
    st.sampled_from([0, 23, 24, 255, 256, 65_535, 65_536, 65_560, 131_072, 2**24, 2**32 - 1]),
)  # fmt: skip
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**64), 2**64 - 1), st.binary(max_size=40), st.text(max_size=40)
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=30)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(st.text(max_size=30), inner, max_size=5)
    ),
    max_leaves=20,
)
EXTRA_KEYS = st.none() | st.lists(
    st.one_of(
        st.tuples(st.just("lora"), st.text(), st.text()),
        st.tuples(st.just("mm"), st.text(), st.integers(-(2**31), 2**31)),
        st.tuples(st.just("cache_salt"), st.text()),
        st.tuples(st.just("prompt_embeds"), st.binary()),
    ),
    max_size=4,
).map(tuple)


def oracle(tokens: Any, chunk_tokens: int, root: bytes, extra_keys: Any = lambda start, end: None) -> list[bytes]:
    digests, parent = [], root
    for start in range(0, len(tokens) - chunk_tokens + 1, chunk_tokens):
        end = start + chunk_tokens
        item = (parent, tuple(tokens[start:end]), extra_keys(start, end))
        parent = sha256(cbor2.dumps(item, canonical=True)).digest()
        digests.append(parent)
    return digests


def hexes(digests: list[bytes]) -> list[str]:
    return [digest.hex() for digest in digests]


def test_known_vectors():
    zero = none_hash("0")
    assert zero.hex() == "4e1195df020de59e0d65a33a4279f1183e7ae4e5d980e309f8b55adff2e61c3e"
    assert none_hash().hex() == "9bd96a485ad84efdafb72ee48a1d7a69bcead0f8f0433173941b276b9581eef0"
    assert hexes(Chain(3, zero).extend([1, 2, 3])) == [
        "cda40c7574ea461341f97ec2da7fd58b6a87bb2dec300b56459988ca24465813"
    ]
    assert hexes(Chain(256, zero).extend(range(512))) == [
        "f3de83132fabc7fa86835e24f2a2008df215e9d03ba998de8e1aaa1431327685",
        "371af08f4403543b92424de857c05f7e7e941c51fc259b7b6c5de7956b6adb7e",
    ]
    assert hexes(Chain(256, none_hash()).extend(list(range(256)))) == [
        "dd47fa420415cf9acaf8ddeab12385e1265d5358c82da0c75d3418b1423a61ad"
    ]


@settings(max_examples=150, deadline=None)
@given(VALUES)
def test_encoder_is_cbor2s(value):
    assert cbor.encode(value) == cbor2.dumps(value, canonical=True)


def test_encoder_at_the_edges_of_every_width():
    edges = [edge + step for edge in (0, 24, 2**8, 2**16, 2**32, 2**64) for step in (-1, 0) if edge + step < 2**64]
    for value in edges:
        assert cbor.encode(value) == cbor2.dumps(value, canonical=True)
        assert cbor.encode(-1 - value) == cbor2.dumps(-1 - value, canonical=True)
    for size in (23, 24, 255, 256, 65_535, 65_536):
        for value in (bytes(size), "a" * size, (0,) * size):
            assert cbor.encode(value) == cbor2.dumps(value, canonical=True)


@pytest.mark.parametrize("value", [1.5, {1}, np.int64(1), {1: 2}, (0, [object()])])
def test_encoder_refuses_other_types(value):
    with pytest.raises(TypeError):
        cbor.encode(value)


@pytest.mark.parametrize("value", [2**64, -(2**64) - 1, "\ud800"])
def test_encoder_refuses_what_does_not_fit(value):
    with pytest.raises(ValueError, match=r"64|surrogates"):
        cbor.encode(value)


@settings(max_examples=200, deadline=None)
@given(st.lists(UINTS, max_size=120), st.integers(1, 40), st.binary(min_size=32, max_size=32))
@example([70_000] * 60, 20, bytes(32))
@example([5, 65_536, 5, 2**32 - 1], 1, bytes(32))
def test_chain_is_cbor2s(tokens, chunk_tokens, root):
    assert Chain(chunk_tokens, root).extend(tokens) == oracle(tokens, chunk_tokens, root)


@pytest.mark.parametrize("vocabulary", [24, 256, 50_000, 128_000, 2**32])
@pytest.mark.parametrize("chunk_tokens", [16, 256, 13_200])
def test_long_chain_over_several_batches(vocabulary, chunk_tokens):
    tokens = np.random.default_rng(vocabulary).integers(0, vocabulary, 70_000, dtype=np.uint32)
    assert Chain(chunk_tokens, none_hash()).extend(tokens) == oracle(tokens.tolist(), chunk_tokens, none_hash())


def test_one_chunk_longer_than_a_batch():
    tokens = list(range(150_000))
    assert Chain(75_000, none_hash()).extend(tokens) == oracle(tokens, 75_000, none_hash())


@pytest.mark.parametrize("around", [255, 256, 257])
def test_every_width_beside_every_other_at_the_end_of_a_batch(around):
    """A word is written over the end of the one before: the last of a batch must not be cut, nor cut the next."""
    edges = [0, 23, 24, 255, 256, 65_535, 65_536, 2**32 - 1]
    pairs = [token for left in edges for right in edges for token in (left, right)]
    tokens = np.array((pairs * 300)[: 8192 * 2 + around], np.uint32)
    assert Chain(16, none_hash()).extend(tokens) == oracle(tokens.tolist(), 16, none_hash())


@settings(max_examples=100, deadline=None)
@given(st.lists(EXTRA_KEYS, min_size=5, max_size=5), st.lists(UINTS, min_size=20, max_size=23))
def test_extra_keys_go_with_their_range(keys, tokens):
    def extra_keys(start: int, end: int) -> Any:
        assert end - start == 4
        return keys[start // 4]

    assert Chain(4, none_hash(), extra_keys).extend(tokens) == oracle(tokens, 4, none_hash(), extra_keys)


@settings(max_examples=100, deadline=None)
@given(st.lists(UINTS, max_size=60), st.lists(st.integers(0, 60), max_size=8), st.integers(1, 9))
def test_grown_in_any_steps_is_hashed_at_once(tokens, cuts, chunk_tokens):
    whole = Chain(chunk_tokens, none_hash(), lambda start, end: (("mm", "x", start),)).extend(tokens)
    chain = Chain(chunk_tokens, none_hash(), lambda start, end: (("mm", "x", start),))
    given_out = [digest for cut in [*sorted(cuts), 60] for digest in chain.extend(tokens[:cut])]
    assert given_out == chain.digests == whole


class Recording(list[int]):
    """A list that keeps which of its ranges were read."""

    def __init__(self, tokens: Any):
        super().__init__(tokens)
        self.read: list[slice] = []

    def __getitem__(self, at: Any) -> Any:
        self.read.append(at)
        return super().__getitem__(at)


def test_only_the_tail_is_read():
    chain = Chain(4, none_hash())
    chain.extend(list(range(9)))
    tokens = Recording(range(14))
    assert len(chain.extend(tokens)) == 1
    assert tokens.read == [slice(8, 12)]
    tokens.read.clear()
    assert chain.extend(tokens) == []
    assert tokens.read == []


def test_fewer_tokens_than_hashed_are_refused():
    chain = Chain(4, none_hash())
    chain.extend(list(range(8)))
    with pytest.raises(ValueError, match="7 tokens where 8"):
        chain.extend(list(range(7)))


@pytest.mark.parametrize("changed", [0, 15, 16, 40, 63])
def test_a_changed_token_changes_its_digest_and_all_later_ones(changed):
    tokens = list(range(64))
    before = Chain(16, none_hash()).extend(tokens)
    tokens[changed] += 100
    after = Chain(16, none_hash()).extend(tokens)
    same = [x == y for x, y in zip(before, after, strict=True)]
    assert same == [i < changed // 16 for i in range(4)]


def test_order_and_root_matter():
    assert Chain(2, none_hash()).extend([1, 2]) != Chain(2, none_hash()).extend([2, 1])
    assert Chain(2, none_hash("0")).extend([1, 2]) != Chain(2, none_hash("1")).extend([1, 2])
    # The bytes of 1, 2, 3, 4 are the same however they are cut: the array heads tell the chunks apart.
    assert Chain(2, none_hash()).extend([1, 2, 3, 4])[-1] != Chain(4, none_hash()).extend([1, 2, 3, 4])[-1]


class Tensor:
    """What a tensor looks like from here: sliceable, and an array on request."""

    def __init__(self, words: Any):
        self.words = words

    def __len__(self) -> int:
        return len(self.words)

    def __getitem__(self, at: Any) -> Tensor:
        return Tensor(self.words[at])

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        return self.words


def test_all_forms_of_tokens_give_the_same():
    tokens = [0, 23, 24, 255, 256, 40_000, 65_535, 7] * 6
    words = np.array(tokens, np.int64)
    forms = [
        tokens, tuple(tokens), array("I", tokens), array("q", tokens), words, words.astype(np.uint32),
        words.astype(">u4"), words.astype(np.uint16), words.astype(np.int32), words.astype(np.uint64),
        np.repeat(words, 2)[::2], memoryview(words), Tensor(words), [np.int64(token) for token in tokens],
    ]  # fmt: skip
    expected = oracle(tokens, 16, none_hash())
    for form in forms:
        words = token_array(form)
        assert words.dtype == np.uint32
        assert words.dtype.isnative
        assert words.flags.c_contiguous
        assert words.tolist() == tokens
        assert Chain(16, none_hash()).extend(form) == expected


def test_no_copy_of_what_is_right_already():
    words = np.arange(8, dtype=np.uint32)
    assert np.shares_memory(token_array(words), words)


@pytest.mark.parametrize("empty", [[], (), range(0), np.array([]), np.array([], np.int64), array("I")])
def test_no_tokens(empty):
    assert token_array(empty).shape == (0,)
    assert token_array(empty).dtype == np.uint32
    assert Chain(16, none_hash()).extend(empty) == []


@pytest.mark.parametrize("bad", [-1, 2**32, 2**64, -(2**70), 1.0, "a", None])
@pytest.mark.parametrize("at", [0, 5, 9])
def test_a_faulty_token_is_named_by_its_position(bad, at):
    tokens: list[Any] = list(range(10))
    tokens[at] = bad
    with pytest.raises(ValueError, match=rf"^token {at} is .*{str(bad)[:9]}"):
        token_array(tokens)


@pytest.mark.parametrize("bad", [-1, 2**32])
def test_a_faulty_token_of_an_array_is_named(bad):
    words = np.arange(10)
    words[7] = bad
    with pytest.raises(ValueError, match=f"^token 7 is {bad}, outside"):
        token_array(words)


@pytest.mark.parametrize(
    "bad", [np.ones(3), np.ones(3, bool), np.array([1, None]), "abc", b"abc", np.ones((2, 2), int)]
)
def test_what_is_no_sequence_of_ints_is_refused(bad):
    with pytest.raises(ValueError, match=r"not an int|not a sequence"):
        token_array(bad)


def test_positions_count_from_the_request_s_first_token():
    tokens: list[Any] = list(range(8))
    chain = Chain(4, none_hash())
    chain.extend(tokens)
    kept = list(chain.digests)
    for grown in ([*tokens, 1, 2, -3, 4], np.array([*tokens, 1, 2, -3, 4])):
        with pytest.raises(ValueError, match=r"^token 10 is -3"):
            chain.extend(grown)
        assert chain.digests == kept
    assert chain.extend([*tokens, 1, 2, 3, 4]) == oracle([*tokens, 1, 2, 3, 4], 4, none_hash())[2:]


def test_mixed_root_depends_on_both_and_on_where_they_meet():
    roots = {mixed_root(a, b) for a, b in [(b"ab", b"c"), (b"a", b"bc"), (b"c", b"ab"), (b"abc", b"")]}
    assert len(roots) == 4
    assert all(len(root) == 32 for root in roots)
    assert mixed_root(b"ab", b"c") == sha256(b"\x82\x42ab\x41c").digest()


@given(st.integers(0, 200), st.integers(1, 5), st.integers(1, 5), st.lists(st.integers(0, 200), max_size=6))
def test_a_block_chain_takes_the_hash_of_each_chunks_last_block(count, block_tokens, blocks_per_chunk, cuts):
    hashes: list[bytes] = []
    chain = BlockChain(block_tokens * blocks_per_chunk, BlockHashes(hashes, block_tokens))
    given_out = []
    for cut in [*sorted(min(cut, count) for cut in cuts), count]:
        hashes += [sha256(bytes([place])).digest() for place in range(len(hashes), cut // block_tokens)]
        given_out += chain.extend(range(cut))
    chunks = count // (block_tokens * blocks_per_chunk)
    assert given_out == chain.digests == [hashes[(n + 1) * blocks_per_chunk - 1] for n in range(chunks)]


def test_a_block_chain_reads_no_further_than_the_tokens_that_it_is_told_of():
    hashes = Chain(16, none_hash()).extend(range(64))
    assert BlockChain(32, BlockHashes(hashes, 16)).extend(range(63)) == [hashes[1]]


def test_a_block_chain_over_blocks_of_a_whole_chunk_is_the_chain():
    tokens = list(range(100))
    hashes = Chain(16, none_hash()).extend(tokens)
    assert BlockChain(16, BlockHashes(hashes, 16)).extend(tokens) == hashes


def test_an_adapters_content_changes_every_digest_of_a_block_chain():
    hashes = Chain(16, none_hash()).extend(range(64))
    mixed, other = (BlockChain(32, BlockHashes(hashes, 16, one)).extend(range(64)) for one in (b"content", b"other"))
    assert mixed == [mixed_root(one, b"content") for one in hashes[1::2]]
    assert not {*mixed, *other} & {*hashes}
    assert not {*mixed} & {*other}


def test_hashes_that_are_late_make_digests_when_they_come():
    hashes = Chain(16, none_hash()).extend(range(64))
    late: list[bytes] = []
    chain = BlockChain(32, BlockHashes(late, 16))
    found = []
    for one in hashes:
        found.append(chain.extend(range(64)))
        late.append(one)
    assert [*found, chain.extend(range(64))] == [[], [], [hashes[1]], [], [hashes[3]]]


def test_what_is_no_sha256_is_refused():
    with pytest.raises(ValueError, match="not SHA-256"):
        BlockChain(1, BlockHashes([bytes(8)], 1)).extend([1])
    with pytest.raises(ValueError, match="chunks of 24 tokens over blocks of 16"):
        BlockChain(24, BlockHashes([], 16))


def test_key_of():
    assert key_of(b"n" * 16, b"d" * 32) == b"n" * 16 + b"d" * 32
    for namespace, digest in [(b"n" * 15, b"d" * 33), (b"n" * 16, b"d" * 31)]:
        with pytest.raises(ValueError, match="are no key"):
            key_of(namespace, digest)


@pytest.mark.process
def test_the_core_imports_no_cbor2_and_no_torch():
    code = "import sys, kvkeep.core.identity; sys.exit(bool({'cbor2', 'torch'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_vllms_own_function(monkeypatch):
    kv_cache_utils = pytest.importorskip("vllm.v1.core.kv_cache_utils")
    from vllm.utils.hashing import sha256_cbor

    # init_none_hash writes to the module: put it back afterwards.
    for name in ("NONE_HASH", "_NONE_HASH_SEED"):
        if hasattr(kv_cache_utils, name):
            monkeypatch.setattr(kv_cache_utils, name, getattr(kv_cache_utils, name))
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    kv_cache_utils.init_none_hash(sha256_cbor)
    assert none_hash() == kv_cache_utils.NONE_HASH

    def extra_keys(start: int, end: int) -> Any:
        salt = (("cache_salt", "s"),) if start == 0 else ()
        return (
            ("lora", "name", "/path"),
            ("mm", "0" * 64, start - 5),
            *salt,
            ("prompt_embeds", bytes(range(32))),
        )

    tokens = np.random.default_rng(7).integers(0, 128_000, 1024).tolist()
    for keys in (None, extra_keys):
        parent, digests = None, []
        for start in range(0, 1024, 64):
            extra = keys(start, start + 64) if keys else None
            parent = kv_cache_utils.hash_block_tokens(sha256_cbor, parent, tokens[start : start + 64], extra)
            digests.append(parent)
        assert Chain(64, none_hash(), keys).extend(tokens) == digests
        assert BlockChain(256, BlockHashes(digests, 64)).extend(tokens) == digests[3::4]


@pytest.mark.slow
def test_torchs_tensors_are_tokens():
    import torch

    tokens = torch.arange(64) * 1000
    assert Chain(16, none_hash()).extend(tokens) == oracle(tokens.tolist(), 16, none_hash())
    assert Chain(16, none_hash()).extend(tokens.to(torch.int32)) == oracle(tokens.tolist(), 16, none_hash())
    tokens[7] = -1
    with pytest.raises(ValueError, match=r"^token 7 is -1"):
        token_array(tokens)
