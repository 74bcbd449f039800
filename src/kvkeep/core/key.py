"""Digests of chunks, each chained to all tokens before it, and the keys made of them.

The digest of a chunk is the SHA-256 of
`cbor2.dumps((digest of the chunk before, tuple of its tokens, extra keys), canonical=True)`:
byte for byte what vLLM's `hash_block_tokens` returns with `sha256_cbor` for a block of that size. Knows nothing about
engines, requests or what is stored under a key.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from hashlib import sha256
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from kvkeep.core import cbor
from kvkeep.core.units import DIGEST_NBYTES, NAMESPACE_NBYTES

DEFAULT_SEED = "vllm-none-hash"

Tokens = Sequence[int] | npt.NDArray[Any]
ExtraKeys = Callable[[int, int], tuple[Any, ...] | None]
"""The extra keys of the token range [start, end), as vLLM forms them: tuples of text, ints and bytes."""

_MAX_TOKEN = 2**32 - 1
# What is encoded at a time: its scratch arrays (64 KiB) stay in the processor's cache, and below the 128 KiB from
# which on malloc maps fresh pages for each; 65,536 tokens at a time take twice as long.
_BATCH_TOKENS = 1 << 13


def none_hash(seed: str = DEFAULT_SEED) -> bytes:
    """Return the parent of a first chunk: the SHA-256 of the seed as a CBOR text (vLLM's NONE_HASH)."""
    return sha256(cbor.encode(seed)).digest()


def mixed_root(root: bytes, fingerprint: bytes) -> bytes:
    """Return the root of an adapter's chains: the SHA-256 of both as a CBOR pair, unambiguous."""
    return sha256(cbor.encode((root, fingerprint))).digest()


def key_of(namespace: bytes, digest: bytes) -> bytes:
    """Return the key of a chunk, 48 bytes: its namespace, then its digest; ValueError for others' lengths."""
    if len(namespace) != NAMESPACE_NBYTES or len(digest) != DIGEST_NBYTES:
        raise ValueError(f"a namespace of {len(namespace)} bytes and a digest of {len(digest)} are no key")
    return namespace + digest


def token_array(tokens: Tokens) -> cbor.Words:
    """Return the tokens as a contiguous uint32 [n], without a copy where they are one already.

    Takes sequences of ints and whatever numpy reads as an array of ints. Raises ValueError, naming the position, for
    a token below 0, above 2**32 - 1 or not an int.
    """
    return _converted(tokens, 0, len(tokens))


class BlockHashes(NamedTuple):
    """An engine's own hashes of a request's whole blocks of `block_tokens`: a list that grows as its tokens come.

    `fingerprint` is the digest of the request's adapter, which such a hash does not cover; empty without an adapter.
    """

    hashes: Sequence[bytes]
    block_tokens: int
    fingerprint: bytes = b""


class Digests(Protocol):
    """The digests of one request's whole chunks, grown as its tokens come."""

    digests: list[bytes]  # one per whole chunk so far

    def extend(self, tokens: Tokens) -> list[bytes]:
        """Return the digests of the chunks that have become whole; `tokens` are all of the request's so far."""
        ...


class Chain:
    """The digests of one request's whole chunks, grown as its tokens come: no token is hashed twice."""

    digests: list[bytes]  # one per whole chunk so far

    def __init__(self, chunk_tokens: int, root: bytes, extra_keys: ExtraKeys | None = None) -> None:
        if chunk_tokens <= 0:
            raise ValueError(f"chunks of {chunk_tokens} tokens")
        self.digests = []
        self._chunk_tokens = chunk_tokens
        self._extra_keys = extra_keys
        self._parent = root
        self._tokens_head = cbor.array_head(chunk_tokens)

    def extend(self, tokens: Tokens) -> list[bytes]:
        """Hash the chunks that have become whole and return their digests; `tokens` are all of the request's.

        Raises ValueError as `token_array` does (the chunks before the faulty batch are kept), and for fewer tokens than
        have been hashed.
        """
        first = len(self.digests)
        start = first * self._chunk_tokens
        if len(tokens) < start:
            raise ValueError(f"{len(tokens)} tokens where {start} have been hashed")
        end = len(tokens) - len(tokens) % self._chunk_tokens
        batch_tokens = max(1, _BATCH_TOKENS // self._chunk_tokens) * self._chunk_tokens
        for at in range(start, end, batch_tokens):
            self._hash(_converted(tokens, at, min(at + batch_tokens, end)), at)
        return self.digests[first:]

    def _hash(self, words: cbor.Words, start: int) -> None:
        """Append the digests of the chunks of `words`, the first of which is token `start` of the request."""
        octets, offsets = cbor.encode_uints(words, self._chunk_tokens)
        view = octets.data
        tokens_head, parent, tail = self._tokens_head, self._parent, cbor.encode(None)
        for i in range(len(offsets) - 1):
            if self._extra_keys is not None:
                at = start + i * self._chunk_tokens
                tail = cbor.encode(self._extra_keys(at, at + self._chunk_tokens))
            # An array of three: 32 bytes, the array of the tokens, the extra keys.
            hasher = sha256(b"\x83\x58\x20" + parent + tokens_head)
            hasher.update(view[offsets[i] : offsets[i + 1]])
            hasher.update(tail)
            parent = hasher.digest()
            self.digests.append(parent)
            self._parent = parent


class BlockChain:
    """The digests of one request's whole chunks, taken from the engine's own block hashes: no token is hashed.

    The digest of a chunk is the hash of its last block, which covers all tokens before it. Right only for an engine
    whose hashes are `sha256_cbor`. An adapter's fingerprint is mixed into each digest.
    """

    digests: list[bytes]  # one per whole chunk so far

    def __init__(self, chunk_tokens: int, blocks: BlockHashes) -> None:
        step, rest = divmod(chunk_tokens, blocks.block_tokens)
        if step <= 0 or rest:
            raise ValueError(f"chunks of {chunk_tokens} tokens over blocks of {blocks.block_tokens}")
        self.digests = []
        self._chunk_tokens = chunk_tokens
        self._step = step
        self._blocks = blocks

    def extend(self, tokens: Tokens) -> list[bytes]:
        """Return the digests of the chunks that have become whole; `tokens` are all of the request's, only counted.

        Raises ValueError for hashes that are not SHA-256.
        """
        first, step = len(self.digests), self._step
        hashes, _, fingerprint = self._blocks
        chunks = min(len(tokens) // self._chunk_tokens, len(hashes) // step)  # hashes may come later than tokens
        lasts = [bytes(block_hash) for block_hash in hashes[(first + 1) * step - 1 : chunks * step : step]]
        if any(len(block_hash) != DIGEST_NBYTES for block_hash in lasts):
            raise ValueError("a block hash is not SHA-256")
        self.digests += [mixed_root(digest, fingerprint) for digest in lasts] if fingerprint else lasts
        return self.digests[first:]


def _converted(tokens: Tokens, start: int, end: int) -> cbor.Words:
    """Convert the tokens [start, end) and nothing else."""
    part = tokens[start:end]
    if hasattr(part, "__array__") or isinstance(part, (array, memoryview, bytes, bytearray)):
        return _checked(np.asarray(part), start)
    try:
        return np.asarray(array("I", part))  # of all ways from a list to an array the fastest
    except (TypeError, OverflowError):
        raise ValueError(_fault(part, start)) from None


def _checked(words: npt.NDArray[Any], start: int) -> cbor.Words:
    """Return an array as uint32, or refuse it; `start` is the position of its first token."""
    if words.ndim != 1:
        raise ValueError(f"tokens of shape {words.shape} are not a sequence")
    if words.size and words.dtype.kind not in "iu":
        raise ValueError(f"token {start} is not an int but of {words.dtype}")
    if words.size and not np.can_cast(words.dtype, np.uint32) and not 0 <= words.min() <= words.max() <= _MAX_TOKEN:
        raise ValueError(_fault(words.tolist(), start))
    return np.ascontiguousarray(words, np.uint32)


def _fault(tokens: Sequence[Any], start: int) -> str:
    """Say which is the first token that is none."""
    for position, token in enumerate(tokens, start):
        if not hasattr(token, "__index__"):
            return f"token {position} is not an int but {token!r:.40}"
        if not 0 <= token <= _MAX_TOKEN:
            return f"token {position} is {token}, outside of 0 to {_MAX_TOKEN}"
    raise AssertionError("tokens were refused and none of them is faulty")
