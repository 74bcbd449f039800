"""Digests out of vLLM's own block hashes: what must differ differs, what grows agrees, and an engine finds its chunks."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest

from kvkeep.doors.vllm.loaded import Adapters, Expected, LoadedAdapter, Resident
from kvkeep.telemetry import Miss

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]  # vLLM's import warns

BLOCK, CHUNK = 16, 64
TOKENS = list(range(1000, 1200))


@pytest.fixture
def hasher(monkeypatch: pytest.MonkeyPatch):
    """vLLM's own, with its default seed; what it writes to the module is put back."""
    from vllm.utils.hashing import sha256_cbor
    from vllm.v1.core import kv_cache_utils

    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    for name in ("NONE_HASH", "_NONE_HASH_SEED"):
        monkeypatch.setattr(kv_cache_utils, name, getattr(kv_cache_utils, name, None), raising=False)
    kv_cache_utils.init_none_hash(sha256_cbor)
    return kv_cache_utils.get_request_block_hasher(BLOCK, sha256_cbor)


@pytest.fixture
def requests():
    """Translates, over block hashes; adapters 1 and 2 are loaded, of different contents, and 3 is not."""
    from kvkeep.doors.vllm.chain import ChainKind, Requests

    made = Requests(Adapters(), ChainKind(BLOCK))
    load(made, {1: "aa", 2: "bb"})
    return made


def load(requests, digests: dict[int, str]) -> list[str]:
    """A step is over by whose end these have been loaded; the requests that are in doubt then."""
    loads = [LoadedAdapter(0, number, digest) for number, digest in digests.items()]
    return requests.step_over(loads, [Resident(0, frozenset({1, 2}))])


def request(hasher, name="r", tokens=TOKENS, salt=None, lora=None, resumable=False):
    from vllm import SamplingParams
    from vllm.v1.request import Request

    more = {"lora_request": lora, "cache_salt": salt, "resumable": resumable}
    return Request(name, list(tokens), SamplingParams(), None, block_hasher=hasher, **more)


def digests(translated, tokens=None):
    from kvkeep.core.key import BlockChain

    return BlockChain(CHUNK, translated.block_hashes).extend(translated.tokens if tokens is None else tokens)


def lora(name: str, number: int, path: str = "/a"):
    from vllm.lora.request import LoRARequest

    return LoRARequest(name, number, path)


def test_the_digests_are_those_of_vllms_blocks_and_grow_with_its_tokens(hasher, requests):
    from kvkeep.core.key import Chain, none_hash

    one = request(hasher)
    chain_of_blocks = Chain(BLOCK, none_hash())
    assert digests(requests.translated(one)) == chain_of_blocks.extend(TOKENS)[3::4][:3]
    for token in range(56):  # up to the edge of another chunk
        one.append_output_token_ids(token)
    grown = TOKENS + list(range(56))
    chain_of_blocks.extend(grown)
    assert digests(requests.translated(one)) == chain_of_blocks.digests[3::4]
    assert len(chain_of_blocks.digests) == 16


def test_salts_adapters_names_and_contents_all_separate(hasher, requests):
    made = [
        request(hasher, "plain"),
        request(hasher, "salt a", salt="a"),
        request(hasher, "salt b", salt="b"),
        request(hasher, "first", lora=lora("first", 1)),
        request(hasher, "another name", lora=lora("second", 1)),
        request(hasher, "another content", lora=lora("first", 2)),
    ]
    firsts = [digests(requests.translated(one)) for one in made]
    assert all(len(one) == 3 for one in firsts)
    assert len({digest for one in firsts for digest in one}) == 3 * len(made)


def test_an_adapter_that_was_replaced_in_place_separates_although_vllms_hashes_are_the_same(hasher, requests):
    one, again = (request(hasher, name, lora=lora("first", 1)) for name in ("before", "after"))
    assert one.block_hashes == again.block_hashes
    before = digests(requests.translated(one))
    load(requests, {})
    load(requests, {1: "cc"})
    requests.own_cache_emptied()
    requests.drop("before")
    load(requests, {})
    assert not {*before} & {*digests(requests.translated(again))}


def test_what_another_adapter_computes_is_in_doubt_from_then_on(hasher, requests):
    made = [
        request(hasher, "plain"),
        request(hasher, "first", lora=lora("first", 1)),
        request(hasher, "second", lora=lora("second", 2)),
    ]
    roots = [requests.translated(one).root for one in made]
    assert requests.expected(["plain", "first"]) == {"first": Expected(1, ("aa",))}
    assert load(requests, {}) == []
    assert load(requests, {1: "aa", 2: "cc"}) == ["second"]
    assert load(requests, {2: "bb"}) == []
    assert [requests.translated(one).root for one in made] == [*roots[:2], Miss.ADAPTER]
    requests.drop("second")
    assert load(requests, {2: "dd"}) == []


def test_a_request_begins_with_what_is_loaded_when_it_is_first_asked_for(hasher, requests):
    """Of many that arrive together only those of the first step come before the load."""
    early, late = (request(hasher, name, lora=lora("third", 3)) for name in ("early", "late"))
    requests.add(early)
    requests.add(late)
    assert requests.translated(early).root is Miss.ADAPTER
    requests.step_over([LoadedAdapter(0, 3, "cc")], [Resident(0, frozenset({3}))])
    assert requests.translated(early).root is Miss.ADAPTER
    assert isinstance(requests.translated(late).root, bytes)


def test_what_is_in_doubt_is_not_kept_and_says_why(hasher, requests):
    from vllm.utils.hashing import sha256_cbor
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher

    assert requests.translated(request(hasher, "doubt", lora=lora("third", 3))).root is Miss.ADAPTER
    wider = get_request_block_hasher(2 * BLOCK, sha256_cbor)
    assert requests.translated(request(wider, "wider")).root is Miss.HASHES
    assert requests.translated(request(hasher, "session", resumable=True)).root is Miss.SESSION
    assert isinstance(requests.translated(request(hasher, "fine")).root, bytes)


class Counted(list):
    """A list that counts how often one of its items is looked at."""

    looks = 0

    def __getitem__(self, place):
        self.looks += 1
        return super().__getitem__(place)


def with_images(count: int, every: int, length: int):
    """What vLLM's extra keys need of a request with images of `length` tokens, one at the end of each `every`."""
    images = Counted(
        SimpleNamespace(
            identifier=f"image {i}", mm_position=SimpleNamespace(offset=(i + 1) * every - length, length=length)
        )
        for i in range(count)
    )
    return SimpleNamespace(mm_features=images, lora_request=None, cache_salt=None, prompt_embeds=None)


def test_each_image_is_looked_at_a_few_times_however_many_there_are():
    from kvkeep.doors.vllm.chain import extra_keys

    images, every = 500, 80
    asked = with_images(images, every, 70)
    of_range = extra_keys(asked)
    chunks = range(0, images * every, CHUNK)
    found = [of_range(start, start + CHUNK) for start in chunks]
    assert {key[1] for keys in found for key in keys or ()} == {f"image {number}" for number in range(images)}
    assert asked.mm_features.looks <= 3 * (len(chunks) + images)  # with a start from 0 it is 85 times as much


def test_the_images_of_a_range_are_the_same_in_whatever_order_ranges_are_asked_for():
    from vllm.v1.core.kv_cache_utils import generate_block_hash_extra_keys

    from kvkeep.doors.vllm.chain import extra_keys

    asked = with_images(40, 100, 90)
    of_range = extra_keys(asked)
    starts = list(range(0, 4200, CHUNK))
    for order in (starts, starts[::-1], random.Random(1).sample(starts, len(starts)), starts[::2], starts):
        for start in order:
            right = generate_block_hash_extra_keys(asked, start, start + CHUNK, 0)[0]
            assert of_range(start, start + CHUNK) == right


@pytest.mark.parametrize(
    ("wanted", "algorithm", "chunk", "name"),
    [
        ("auto", "sha256_cbor", 64, "vllm"),
        ("kvkeep", "sha256_cbor", 64, "kvkeep"),
        ("auto", "sha256", 64, "kvkeep"),
        ("auto", "xxhash_cbor", 64, "kvkeep"),
        ("auto", "sha256_cbor", 72, "kvkeep"),
    ],
)
def test_only_reproducible_hashes_of_whole_chunks_are_taken(monkeypatch, wanted, algorithm, chunk, name):
    from kvkeep.core.key import DEFAULT_SEED
    from kvkeep.doors.vllm.chain import chain_kind

    cache = SimpleNamespace(
        prefix_caching_hash_algo=algorithm, block_size=BLOCK, prefix_match_unit=None, enable_prefix_caching=True
    )
    parallel = SimpleNamespace(decode_context_parallel_size=1)
    config = SimpleNamespace(cache_config=cache, parallel_config=parallel, kv_transfer_config=object())
    groups = SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=SimpleNamespace(dcp_sharded=False))])
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    kind = chain_kind(wanted, chunk, config, groups)
    assert (kind.name, kind.seed) == (name, DEFAULT_SEED)
    monkeypatch.setenv("PYTHONHASHSEED", "0")  # another seed gives other hashes: the identity says so
    assert chain_kind(wanted, chunk, config, groups).seed == ("0" if name == "vllm" else DEFAULT_SEED)


def test_an_engine_reuses_what_it_stored_under_its_own_hashes_and_answers_the_same(runs):
    keep, plain = runs("block-hashes"), runs("tiny-plain")
    assert (keep.facts["chain"], runs("tiny").facts["chain"]) == ("vllm", "kvkeep")
    assert [keep.external(step) for step in ("whole cold", "whole warm", "extension")] == [0, 512, 512]
    assert [keep.external(step) for step in ("salt a", "salt b", "no salt")] == [0, 0, 0]
    assert [keep.external(step) for step in ("salt a again", "salt b again")] == [512, 512]
    assert [keep.external(f"after the reset {step}") for step in ("cold", "warm")] == [0, 512]
    for step in plain.facts["steps"]:
        for ours, theirs in zip(keep.answers(step), plain.answers(step), strict=True):
            assert ours["tokens"] == theirs["tokens"], step
