"""A real SGLang server on the CPU, and how it is spoken to."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flexkv_core.cli.harness.client import Completion, VllmClient
from flexkv_core.cli.harness.server import EngineServer

BACKEND_ARGUMENTS: Sequence[str] = ("--radix-cache-backend", "flexkv-tiered")
"""All that a user of SGLang types to have FlexKV."""

CPU_ENVIRONMENT: Mapping[str, str] = {
    "SGLANG_USE_CPU_ENGINE": "1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
}
CPU_ARGUMENTS: Sequence[str] = (
    *("--device", "cpu", "--dtype", "float32", "--attention-backend", "torch_native"),
    *("--disable-cuda-graph", "--skip-server-warmup", "--enable-metrics", "--enable-cache-report"),
    "--sleep-on-idle",  # otherwise an idle scheduler takes a core
)
"""float32, because only there a hit and a recomputation are equal token for token."""

_FLUSH_TRIES = 200
_FLUSH_PAUSE_S = 0.05


class SglangServer(EngineServer):
    """``python -m sglang.launch_server``; ``arguments`` follow the model's name on the command line."""

    def __init__(
        self,
        model: str | Path,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        log_path: Path,
        deadline_s: float = 600.0,
        python: str = sys.executable,
    ) -> None:
        command = [python, "-m", "sglang.launch_server", "--model-path", str(model), *arguments]
        super().__init__(command, environment, log_path, deadline_s)

    def client(self) -> SglangClient:
        """A new connection to the server."""
        return SglangClient(self.base_url)


class SglangClient(VllmClient):
    """One keep-alive connection to an SGLang server. Not thread-safe: each thread opens its own."""

    def complete(
        self,
        prompt: Sequence[int],
        tokens_max: int,
        logprobs: bool = False,
        cache_salt: str | None = None,
        ignore_eos: bool = False,
        request_id: str | None = None,
        extra_key: str | None = None,
        dp_rank: int | None = None,
    ) -> Completion:
        """A greedy completion of token ids, streamed. Raises httpx.HTTPStatusError when the server refuses it.

        SGLang before 0.5.18 knows no ``cache_salt`` here; its ``extra_key`` separates as well. ``dp_rank``: of the server's
        data-parallel engines the one that answers; None leaves the choice to the server.
        """
        body: dict[str, Any] = {
            "input_ids": list(prompt),
            "sampling_params": {"temperature": 0, "max_new_tokens": tokens_max, "ignore_eos": ignore_eos},
            "stream": True,
            "return_logprob": logprobs,
        }
        if cache_salt is not None:
            body["cache_salt"] = cache_salt
        if extra_key is not None:
            body["extra_key"] = extra_key
        if request_id is not None:
            body["rid"] = request_id
        if dp_rank is not None:
            body["routed_dp_rank"] = dp_rank
        return self._generate(body)

    def reset_prefix_cache(self, external: bool = False) -> None:
        """Empties the engine's own prefix cache; SGLang has no way to empty what is behind it, so ``external`` must be False.

        The engine refuses while requests run, so it is asked again for up to 10 s. Raises TimeoutError after that.
        """
        assert not external, "SGLang empties its own cache only"
        for _ in range(_FLUSH_TRIES):
            if self._http.post("/flush_cache").status_code == 200:
                return
            time.sleep(_FLUSH_PAUSE_S)
        raise TimeoutError("the engine did not flush its cache: requests went on running")

    def _generate(self, body: dict[str, Any]) -> Completion:
        ttft_ms, meta, text, token_ids = 0.0, {}, "", []
        start = time.perf_counter()
        with self._http.stream("POST", "/generate", json=body) as reply:
            if reply.status_code != 200:
                reply.read()
            reply.raise_for_status()
            for line in reply.iter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                chunk = json.loads(line[6:])
                if "error" in chunk:
                    raise RuntimeError(f"the server ended the stream with an error: {chunk['error']}")
                ttft_ms = ttft_ms or (time.perf_counter() - start) * 1e3
                meta, text, token_ids = chunk["meta_info"], chunk["text"], chunk["output_ids"]
        total_ms = (time.perf_counter() - start) * 1e3
        details = meta.get("cached_tokens_details") or {}
        return Completion(
            prompt_tokens=int(meta["prompt_tokens"]),
            cached_tokens=int(meta["cached_tokens"]),
            token_ids=tuple(token_ids),
            logprobs=tuple(float(entry[0]) for entry in meta.get("output_token_logprobs") or ()),
            text=text,
            finish_reason=(meta.get("finish_reason") or {}).get("type"),
            ttft_ms=ttft_ms,
            total_ms=total_ms,
            external_tokens=int(details.get("host", 0)) + int(details.get("storage", 0)),
        )
