"""What bridges versions of vLLM, tried against words of versions that are not installed here."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import pytest
from vllm.distributed.kv_transfer.kv_connector.v1 import base

from flexkv_core.errors import ConfigError
from flexkv_vllm.compat import kv_events, preemptions, settings, worker_results


def test_event_leaves_out_what_the_version_does_not_know() -> None:
    fields = {
        "block_hashes": [b"1"],
        "parent_block_hash": None,
        "token_ids": [1],
        "block_size": 1,
        "lora_id": None,
        "lora_name": None,
    }
    event = kv_events.block_stored(**fields, medium=kv_events.MEDIUM_CPU, of_a_later_version="x")
    assert (event.block_hashes, event.medium) == ([b"1"], "CPU")


def test_failed_loads_are_computed_in_every_version() -> None:
    assert not settings.recompute_failed_loads(SimpleNamespace())  # before 0.14
    transfer = SimpleNamespace(kv_load_failure_policy="fail")
    assert settings.recompute_failed_loads(transfer)
    assert transfer.kv_load_failure_policy == "recompute"
    assert not settings.recompute_failed_loads(transfer)


def test_replica() -> None:
    assert settings.data_parallel_index(SimpleNamespace(data_parallel_rank=3)) == 3  # before 0.14
    assert settings.data_parallel_index(SimpleNamespace(data_parallel_rank=0, data_parallel_index=2)) == 2


def test_preemptions_bring_metadata_or_names(monkeypatch: pytest.MonkeyPatch) -> None:
    assert preemptions.BRING_METADATA
    with monkeypatch.context() as patch:
        patch.setattr(base.KVConnectorBase_V1, "handle_preemptions", lambda self, preempted_req_ids: None)
        assert not importlib.reload(preemptions).BRING_METADATA
        patch.delattr(base.KVConnectorBase_V1, "handle_preemptions")
        assert not importlib.reload(preemptions).BRING_METADATA
    assert importlib.reload(preemptions).BRING_METADATA


def test_version_without_the_workers_results_is_refused_with_the_way_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        patch.delattr(base, "KVConnectorWorkerMetadata")
        with pytest.raises(
            ConfigError, match=r"run `flexkv patch apply --engine vllm`, or use 0\.18 or newer"
        ):
            importlib.reload(worker_results)
    importlib.reload(worker_results)
