"""Counters of one BlockManager. Plain numbers; adapters carry them to the engine's own metrics."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields

from flexkv_core.transfer.plan import Delivery, OpResult, OpStatus
from flexkv_core.types import Direction


@dataclass
class Counters:
    """What happened since the manager was made. Only grows; read a consistent copy with :meth:`BlockManager.counters`."""

    lookups: int = 0
    lookup_tokens: int = 0  # tokens in full blocks that were asked for
    hit_tokens: int = 0  # of those, tokens that a load was planned for
    loaded_blocks: int = 0
    loaded_bytes: int = 0
    load_seconds: float = 0.0  # time in copies, without queueing
    layerwise_loads: int = 0  # ops that were delivered layer by layer
    layerwise_stores: int = 0  # ops that may be copied layer by layer
    stored_blocks: int = 0
    stored_bytes: int = 0
    store_seconds: float = 0.0
    evicted_blocks: int = 0
    corrupt_blocks: int = 0  # checksum mismatches; each became a miss
    failed_loads: int = 0  # ops, not blocks
    failed_stores: int = 0
    ssd_read_blocks: int = 0
    ssd_written_blocks: int = 0
    ssd_corrupt_blocks: int = 0  # found by reads and by the scrubber; each is quarantined
    ssd_evicted_blocks: int = 0
    ssd_restarts: int = 0  # of the storage process
    remote_lookups: int = 0  # sequences that the remote store was asked for
    remote_late_lookups: int = 0  # answers for which no request waited any more
    remote_read_blocks: int = 0
    remote_late_reads: int = 0  # requests that stopped waiting before all that was found had come
    remote_written_blocks: int = 0  # written, or found there
    remote_dropped_blocks: int = 0  # waited to be written, and were pushed out by newer ones
    remote_corrupt_blocks: int = 0  # values that were not what their name says; each was removed
    remote_failures: int = 0  # calls of the remote store that failed, not blocks
    remote_breaker_openings: int = 0  # times that the remote store was left alone because it failed
    remote_restarts: int = 0  # of the remote process
    dropped_blocks: int = 0  # wanted to be stored, found no room
    unstorable_blocks: int = 0  # with values that are not finite, which cannot be rounded
    prefetched_blocks: int = 0  # read from a lower tier before a load asked for them
    verify_checked: int = 0  # blocks of sampled hits that were compared with what the engine computed anew
    verify_mismatches: int = 0  # of those, blocks that were wrong; each left all tiers
    verify_skipped: int = 0  # blocks of sampled hits that could not be compared

    def add_launch(self, direction: Direction, delivery: Delivery) -> None:
        """Count an op that begins."""
        if delivery is not Delivery.WHOLE:
            self.layerwise_loads += direction is Direction.LOAD
            self.layerwise_stores += direction is Direction.STORE

    def add_copy(self, direction: Direction, result: OpResult, block_bytes: int) -> None:
        """Count a copy that has ended."""
        blocks = int(result.ok.sum())
        if direction is Direction.LOAD:
            self.loaded_blocks += blocks
            self.loaded_bytes += blocks * block_bytes
            self.load_seconds += result.seconds
            self.failed_loads += result.status is OpStatus.FAILED
        else:
            self.stored_blocks += blocks
            self.stored_bytes += blocks * block_bytes
            self.store_seconds += result.seconds
            self.failed_stores += result.status is OpStatus.FAILED
            if result.status is OpStatus.DONE:
                self.unstorable_blocks += len(result.ok) - blocks

    def as_dict(self) -> dict[str, int | float]:
        """The counters by name."""
        return asdict(self)


GAUGE_WORDS = {
    "host_blocks_used": "Blocks in the host tier.",
    "host_blocks": "Blocks that the host tier holds at most.",
}
"""What an adapter reports beside the counters: name and meaning."""

COUNTER_WORDS = {
    "lookups": "Loads that were planned.",
    "lookup_tokens": "Tokens that loads were planned for.",
    "hit_tokens": "Tokens that were found in a tier and loaded.",
    "loaded_blocks": "Blocks copied to the device.",
    "loaded_bytes": "Bytes copied to the device.",
    "load_seconds": "Time spent in copies to the device.",
    "layerwise_loads": "Loads that were delivered layer by layer.",
    "layerwise_stores": "Stores that were planned layer by layer.",
    "stored_blocks": "Blocks copied to the host tier.",
    "stored_bytes": "Bytes copied to the host tier.",
    "store_seconds": "Time spent in copies to the host tier.",
    "evicted_blocks": "Blocks that left the host tier to make room.",
    "corrupt_blocks": "Blocks whose checksum did not match; each was recomputed.",
    "failed_loads": "Loads that failed and were recomputed.",
    "failed_stores": "Stores that failed or were refused.",
    "ssd_read_blocks": "Blocks read from the SSD.",
    "ssd_written_blocks": "Blocks written to the SSD.",
    "ssd_corrupt_blocks": "Blocks on the SSD whose checksum did not match; each is quarantined.",
    "ssd_evicted_blocks": "Blocks that left the SSD to make room.",
    "ssd_restarts": "Times that the storage process was started again.",
    "remote_lookups": "Prompts that the remote store was asked for.",
    "remote_late_lookups": "Answers of the remote store for which no request waited any more.",
    "remote_read_blocks": "Blocks read from the remote store.",
    "remote_late_reads": "Requests that stopped waiting for the remote store before all had come.",
    "remote_written_blocks": "Blocks written to the remote store, or found there.",
    "remote_dropped_blocks": "Blocks that waited to be written to the remote store and were pushed out by newer ones.",
    "remote_corrupt_blocks": "Values of the remote store that were not what their name says; each was removed.",
    "remote_failures": "Calls of the remote store that failed.",
    "remote_breaker_openings": "Times that the remote store was left alone because it failed.",
    "remote_restarts": "Times that the remote process was started again.",
    "dropped_blocks": "Blocks that found no room.",
    "unstorable_blocks": "Blocks with a NaN or an infinity, which fp8 cannot keep.",
    "prefetched_blocks": "Blocks read from a lower tier before a load asked for them.",
    "verify_checked": "Blocks of sampled hits that were compared with what the engine computed anew.",
    "verify_mismatches": "Blocks that were stored and are not what the engine computes; any is an alarm.",
    "verify_skipped": "Blocks of sampled hits that could not be compared.",
}
"""The counters' meanings, by name."""

assert COUNTER_WORDS.keys() == {field.name for field in fields(Counters)}
