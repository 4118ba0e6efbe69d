"""Speaks to a vLLM server: completions with their time to first token, cache resets, metrics."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

_RESET_TRIES = 200
_RESET_PAUSE_S = 0.05


@dataclass(frozen=True)
class Completion:
    """One answer, as measured from the client's side."""

    prompt_tokens: int
    cached_tokens: int
    """Prompt tokens that the engine did not compute: its own cache's and the connector's together."""
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    """Log-probability of each generated token; empty unless it was asked for."""
    text: str
    finish_reason: str | None
    ttft_ms: float
    """From before the request is sent until the first generated token has arrived."""
    total_ms: float
    external_tokens: int | None = None
    """Of ``cached_tokens``, those that did not lie on the device, where the engine says so in its answer."""


@dataclass(frozen=True)
class MetricSample:
    """One line of ``/metrics``."""

    name: str
    labels: tuple[tuple[str, str], ...]
    value: float


@dataclass(frozen=True)
class Metrics:
    """What ``/metrics`` said at one moment."""

    samples: tuple[MetricSample, ...]

    def total(self, name: str, **labels: str) -> float:
        """The sum over all samples called ``name`` that carry these labels; 0.0 when there is none."""
        wanted = set(labels.items())
        return sum(s.value for s in self.samples if s.name == name and wanted <= set(s.labels))

    def names(self, part: str) -> list[str]:
        """Names that contain ``part``, sorted, each once."""
        return sorted({sample.name for sample in self.samples if part in sample.name})


class VllmClient:
    """One keep-alive connection to a vLLM server. Not thread-safe: each thread opens its own. ``data_parallel_rank``: of the server's
    engines the one that answers; None leaves the choice to the server."""

    def __init__(
        self, base_url: str, timeout_s: float = 300.0, data_parallel_rank: int | None = None
    ) -> None:
        headers = {} if data_parallel_rank is None else {"X-data-parallel-rank": str(data_parallel_rank)}
        self._http = httpx.Client(base_url=base_url, timeout=timeout_s, headers=headers)
        self._model: str | None = None

    def __enter__(self) -> VllmClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connection."""
        self._http.close()

    @property
    def model(self) -> str:
        """The name under which the server serves its model."""
        if self._model is None:
            self._model = str(self._get_json("/v1/models")["data"][0]["id"])
        return self._model

    @property
    def context_tokens_max(self) -> int:
        """The longest prompt and answer together, in tokens."""
        return int(self._get_json("/v1/models")["data"][0]["max_model_len"])

    def tokenize(self, text: str, chat: bool = False) -> list[int]:
        """Token ids of a prompt; with ``chat``, as the user's message of the model's chat template where it has one."""
        if chat:
            message = {"role": "user", "content": text}
            reply = self._http.post(
                "/tokenize", json={"model": self.model, "messages": [message], "add_generation_prompt": True}
            )
            if reply.status_code == 200:
                return list(reply.json()["tokens"])
        return list(self._post_json("/tokenize", {"model": self.model, "prompt": text})["tokens"])

    def complete(
        self,
        prompt: Sequence[int],
        tokens_max: int,
        logprobs: bool = False,
        cache_salt: str | None = None,
        ignore_eos: bool = False,
    ) -> Completion:
        """A greedy completion of token ids, streamed. Raises httpx.HTTPStatusError when the server refuses it."""
        body: dict[str, Any] = {
            "model": self.model,
            "prompt": list(prompt),
            "max_tokens": tokens_max,
            "temperature": 0.0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
            "ignore_eos": ignore_eos,
        }
        if logprobs:
            body["logprobs"] = 1
        if cache_salt is not None:
            body["cache_salt"] = cache_salt
        return self._stream(body)

    def reset_prefix_cache(self, external: bool = False) -> None:
        """Empties the engine's own prefix cache; with ``external`` FlexKV's too.

        The engine refuses while blocks are held, which they are until a finished request's store is done, so it is asked again
        for up to 10 s. Raises TimeoutError after that.
        """
        for _ in range(_RESET_TRIES):
            reply = self._http.post("/reset_prefix_cache", params={"reset_external": external})
            reply.raise_for_status()
            if reply.json()["success"]:
                return
            time.sleep(_RESET_PAUSE_S)
        raise TimeoutError("the engine did not reset its prefix cache: its blocks stayed in use")

    def metrics(self) -> Metrics:
        """The server's ``/metrics``, parsed."""
        reply = self._http.get("/metrics")
        reply.raise_for_status()
        return Metrics(
            tuple(
                MetricSample(sample.name, tuple(sorted(sample.labels.items())), sample.value)
                for family in text_string_to_metric_families(reply.text)
                for sample in family.samples
            )
        )

    def _stream(self, body: dict[str, Any]) -> Completion:
        token_ids: list[int] = []
        logprobs: list[float] = []
        text: list[str] = []
        finish_reason: str | None = None
        usage: dict[str, Any] = {}
        ttft_ms = 0.0
        start = time.perf_counter()
        with self._http.stream("POST", "/v1/completions", json=body) as reply:
            if reply.status_code != 200:
                reply.read()
            reply.raise_for_status()
            for line in reply.iter_lines():
                chunk = _event(line)
                if chunk is None:
                    continue
                usage = chunk.get("usage") or usage
                for choice in chunk["choices"]:
                    if choice.get("token_ids") and not token_ids:
                        ttft_ms = (time.perf_counter() - start) * 1e3
                    token_ids += choice.get("token_ids") or []
                    logprobs += (choice.get("logprobs") or {}).get("token_logprobs") or []
                    text.append(choice["text"])
                    finish_reason = choice["finish_reason"] or finish_reason
        total_ms = (time.perf_counter() - start) * 1e3
        details = usage.get("prompt_tokens_details") or {}
        return Completion(
            prompt_tokens=int(usage["prompt_tokens"]),
            cached_tokens=int(details.get("cached_tokens") or 0),
            token_ids=tuple(token_ids),
            logprobs=tuple(logprobs),
            text="".join(text),
            finish_reason=finish_reason,
            ttft_ms=ttft_ms,
            total_ms=total_ms,
        )

    def _get_json(self, path: str) -> Any:
        reply = self._http.get(path)
        reply.raise_for_status()
        return reply.json()

    def _post_json(self, path: str, body: dict[str, Any]) -> Any:
        reply = self._http.post(path, json=body)
        reply.raise_for_status()
        return reply.json()


def _event(line: str) -> dict[str, Any] | None:
    """The JSON object of one server-sent event, or None for blank lines and the closing ``[DONE]``."""
    if not line.startswith("data: ") or line == "data: [DONE]":
        return None
    event: dict[str, Any] = json.loads(line[6:])
    if "error" in event:
        raise RuntimeError(f"the server ended the stream with an error: {event['error']}")
    return event
