"""vLLM's own offloading connector with the CPU as the device, for ``scripts/bench peers`` only.

``OffloadingConnector`` refuses a CPU because its copies are made of CUDA streams. It takes its worker from a class that its
configuration names (``spec_module_path``); this one moves the pages with FlexKV's own native copies, at once, in the thread that asks.
All that decides (lookup, eviction, scheduling of loads and stores) stays vLLM's. So the comparison is of the two connectors, and the
peer has the faster copies of the two: it neither sums checksums nor waits for a thread.

Written against vLLM 0.32.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from vllm.v1.kv_offload.base import (
    CanonicalKVCaches,
    GPULoadStoreSpec,
    LoadStoreSpec,
    OffloadingWorker,
    TransferResult,
)
from vllm.v1.kv_offload.cpu.spec import CPUOffloadingSpec

from flexkv_core import native


class CpuDeviceOffloadingSpec(CPUOffloadingSpec):
    """vLLM's host-memory spec with :class:`NativeCopyWorker` as its worker."""

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        """The worker; see the base class. vLLM asks once."""
        if self.blocks_per_chunk != 1 or len(kv_caches.group_data_refs) != 1:
            raise ValueError("the comparison wants chunks of one block and one KV cache group")
        return NativeCopyWorker(kv_caches, self.num_chunks)


class NativeCopyWorker(OffloadingWorker):
    """Copies whole pages between the engine's tensors and one pool of ``chunks`` rows, as they are asked for."""

    def __init__(self, kv_caches: CanonicalKVCaches, chunks: int) -> None:
        pages = [cache.tensor.view(torch.int8).view(-1, cache.page_size_bytes) for cache in kv_caches.tensors]
        page_bytes = {page.shape[1] for page in pages}
        if len(page_bytes) != 1:
            raise ValueError(f"pages of several sizes: {sorted(page_bytes)} bytes")
        self._pages = pages
        self._pool = torch.zeros((chunks, len(pages) * page_bytes.pop()), dtype=torch.int8)
        self._finished: list[TransferResult] = []

    def submit_store(self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: LoadStoreSpec) -> bool:
        """Engine -> pool."""
        return self._copy(native.gather, job_id, src_spec, dst_spec)

    def submit_load(self, job_id: int, src_spec: LoadStoreSpec, dst_spec: GPULoadStoreSpec) -> bool:
        """Pool -> engine."""
        return self._copy(native.scatter, job_id, dst_spec, src_spec)

    def get_finished(self) -> list[TransferResult]:
        """All jobs since the last call: each was done when it was submitted."""
        finished, self._finished = self._finished, []
        return finished

    def wait(self, job_ids: set[int]) -> None:
        """Nothing is under way."""

    def _copy(self, copy: Any, job_id: int, device: Any, pool: Any) -> bool:
        copy(
            segment_addrs=np.array([page.data_ptr() for page in self._pages]),
            block_strides=np.array([page.stride(0) for page in self._pages]),
            piece_bytes=self._pages[0].shape[1],
            blocks=np.ascontiguousarray(device.block_ids, np.int64),
            block_count=self._pages[0].shape[0],
            slot_base=self._pool.data_ptr(),
            slot_stride=self._pool.stride(0),
            slots=np.ascontiguousarray(pool.block_ids, np.int64),
            slot_count=self._pool.shape[0],
        )
        self._finished.append(TransferResult(job_id, True, len(device.block_ids) * self._pool.stride(0), 0.0))
        return True
