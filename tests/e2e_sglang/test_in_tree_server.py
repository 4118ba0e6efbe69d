"""``--enable-flexkv`` on a real server: the same hits and the same answers as the native adapter gives in ``test_server.py``."""

from __future__ import annotations

from pathlib import Path

import pytest

from flexkv_core.cli.harness.sglang import CPU_ARGUMENTS, CPU_ENVIRONMENT, SglangServer
from tests.e2e_sglang.checks import ask, differences, new_prompt


@pytest.mark.extended
def test_hits_give_the_same_answer(llama: Path, tmp_path: Path) -> None:
    settings = tmp_path / "flexkv.yaml"
    settings.write_text("host_bytes: 48MiB\n")
    arguments = [
        *CPU_ARGUMENTS,
        *("--enable-flexkv", "--flexkv-config-file", str(settings)),
        *("--page-size", "1", "--max-total-tokens", "6000", "--chunked-prefill-size", "512"),
    ]
    server = SglangServer(llama, arguments, CPU_ENVIRONMENT, tmp_path / "server.log")
    with server, server.client() as client:
        prompt = new_prompt(1, 1601)
        cold = ask(client, prompt, salt="one")
        device = ask(client, prompt, salt="one")
        client.reset_prefix_cache()
        other, plain, host = (ask(client, prompt, salt=salt) for salt in ("two", None, "one"))
        assert (device.external_tokens, device.cached_tokens) == (0, 1600)
        assert (other.cached_tokens, plain.cached_tokens) == (0, 0)
        assert host.cached_tokens == host.external_tokens == 1600
        for answer in (device, other, plain, host):
            assert not differences(cold, answer)
