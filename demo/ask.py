"""Talks to a running OpenAI server: streams an answer, resets caches, reads counters. Knows nothing about kvkeep."""

from __future__ import annotations

import http.client
import json
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

ANSWER_LIMIT_S = 300.0
RESET_LIMIT_S = 20.0
HIT_SOURCES = "vllm:prompt_tokens_cached_by_source"


class AskError(Exception):
    """The server refused a request or broke it off."""


@dataclass(frozen=True)
class Answer:
    """One streamed answer; `ttft_s` runs from sending the request to the first piece of text."""

    text: str
    ttft_s: float
    total_s: float
    prompt_tokens: int
    cached_tokens: int


@dataclass(frozen=True)
class Counters:
    """The server's counters at one moment: summed over labels by name, and prompt tokens reused by source."""

    totals: dict[str, float]
    reused_tokens: dict[str, int]

    def reused_since(self, earlier: Counters) -> dict[str, int]:
        """Count the prompt tokens reused since `earlier`, by vLLM's name of their source; only those above 0."""
        grown = {s: n - earlier.reused_tokens.get(s, 0) for s, n in self.reused_tokens.items()}
        return {source: n for source, n in grown.items() if n > 0}


@dataclass(frozen=True)
class Client:
    """One model of one server."""

    host: str
    port: int
    model: str

    def ask(self, prompt: str, max_tokens: int, salt: str = "") -> Answer:
        """Stream the greedy answer to a user message, reusing nothing of another `salt`; AskError if that fails."""
        body: dict[str, object] = {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": 0,
            "max_tokens": max_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if salt:
            body["cache_salt"] = salt
        pieces: list[str] = []
        first_s = 0.0
        usage: dict[str, Any] = {}
        start_s = time.perf_counter()
        for event in self._events("/v1/chat/completions", body):
            usage = event.get("usage") or usage
            for choice in event.get("choices", ()):
                text = choice["delta"].get("content")
                if text and not pieces:
                    first_s = time.perf_counter() - start_s
                pieces += [text] if text else []
        if not pieces or not usage:
            raise AskError("the answer held no text or no usage")
        details = usage.get("prompt_tokens_details") or {}
        return Answer(
            text="".join(pieces).strip(),
            ttft_s=first_s,
            total_s=time.perf_counter() - start_s,
            prompt_tokens=usage["prompt_tokens"],
            cached_tokens=details.get("cached_tokens") or 0,
        )

    def reset(self) -> None:
        """Empty vLLM's own prefix cache, but not what the connector keeps; AskError if that fails."""
        path = "/reset_prefix_cache?reset_external=false"
        limit_s = time.monotonic() + RESET_LIMIT_S
        while not json.loads(self._read("POST", path))["success"]:  # refused while blocks are still held
            if time.monotonic() > limit_s:
                raise AskError(f"POST {path} did not succeed within {RESET_LIMIT_S:.0f} s")
            time.sleep(0.1)

    def counters(self) -> Counters:
        """Read /metrics."""
        totals: dict[str, float] = defaultdict(float)
        reused: dict[str, int] = defaultdict(int)
        for family in text_string_to_metric_families(self._read("GET", "/metrics")):
            for sample in family.samples:
                totals[sample.name] += sample.value
                if sample.name == f"{HIT_SOURCES}_total":
                    reused[sample.labels["source"]] += int(sample.value)
        return Counters(dict(totals), dict(reused))

    def _read(self, method: str, path: str) -> str:
        connection = http.client.HTTPConnection(self.host, self.port, timeout=ANSWER_LIMIT_S)
        try:
            connection.request(method, path)
            response = connection.getresponse()
            text = response.read().decode()
        except (OSError, http.client.HTTPException) as error:
            raise AskError(f"{method} {path}: {error}") from error
        finally:
            connection.close()
        if response.status != http.client.OK:
            raise AskError(f"{method} {path}: status {response.status}: {text[:300]}")
        return text

    def _events(self, path: str, body: dict[str, object]) -> Iterator[dict[str, Any]]:
        connection = http.client.HTTPConnection(self.host, self.port, timeout=ANSWER_LIMIT_S)
        try:
            connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            if response.status != http.client.OK:
                raise AskError(f"POST {path}: status {response.status}: {response.read(300)!r}")
            for line in response:
                if line.startswith(b"data: {"):
                    event = json.loads(line[len(b"data: ") :])
                    if "error" in event:
                        raise AskError(f"POST {path}: {event['error']}")
                    yield event
        except (OSError, http.client.HTTPException) as error:
            raise AskError(f"POST {path}: {error}") from error
        finally:
            connection.close()
