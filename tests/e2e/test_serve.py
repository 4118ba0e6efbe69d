"""Two vLLM engines of one model on one ``flexkv serve``, and a server that dies under them."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from tests.e2e.engine import BLOCK_TOKENS, Answer, Engine, prompt_tokens
from tests.integration.serving import ROOT, ServerProcess, environment

PROMPT = prompt_tokens(4000, 1500)
FOUND = (len(PROMPT) - 1) // BLOCK_TOKENS * BLOCK_TOKENS


def settings(socket: Path) -> dict[str, object]:
    return {"server": str(socket), "server_deadline_ms": 500}


@pytest.mark.hit
def test_engines_share_and_outlive_their_server(llama: Path, tmp_path: Path) -> None:
    socket = tmp_path / "serve.sock"
    with ServerProcess(socket, slots=20_000) as server, Engine(llama, settings(socket)) as engine:
        cold = engine.ask(PROMPT)
        assert (cold.cached_tokens, cold.external_tokens) == (0, 0)
        second = second_engine(llama, socket)  # it starts with what the first has stored
        assert second.external_tokens == FOUND
        assert (second.token_ids, second.logprobs) == (cold.token_ids, hit(engine).logprobs)

        server.process.send_signal(signal.SIGKILL)
        server.process.wait()
        assert ask_again(engine).external_tokens == 0
        assert ask_again(engine).token_ids == cold.token_ids
        server.start()
        deadline = time.monotonic() + 20
        while not ask_again(engine).external_tokens:  # stored anew, into another segment
            assert time.monotonic() < deadline
        assert hit(engine).token_ids == cold.token_ids
        engine.settle()
        assert engine.free_blocks() == engine.scheduler.kv_cache_manager.block_pool.num_gpu_blocks - 1


def ask_again(engine: Engine) -> Answer:
    """With the engine's own prefix cache empty."""
    engine.reset()
    return engine.ask(PROMPT)


def hit(engine: Engine) -> Answer:
    answer = ask_again(engine)
    assert answer.external_tokens == FOUND
    return answer


def second_engine(model: Path, socket: Path) -> Answer:
    command = [sys.executable, "-m", "tests.e2e.test_serve", str(model), str(socket)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    values = json.loads(done.stdout.splitlines()[-1])
    logprobs = tuple(tuple((int(token), value) for token, value in place) for place in values["logprobs"])
    return Answer(**{**values, "token_ids": tuple(values["token_ids"]), "logprobs": logprobs})


if __name__ == "__main__":
    with Engine(Path(sys.argv[1]), settings(Path(sys.argv[2]))) as other:
        print(json.dumps(asdict(other.ask(PROMPT))))
