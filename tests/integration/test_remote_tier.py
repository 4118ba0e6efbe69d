"""Two managers that share one store: what one computed the other reads, and nothing else."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from flexkv_core.tasks import KVResponseStatus
from tests.stores.sharing import BLOCKS, TOKENS, Engine, wait_until
from tests.unit.core.device import BLOCK_TOKENS


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"dir:{tmp_path}/store"


@pytest.fixture
def engines(url: str) -> Iterator[tuple[Engine, Engine]]:
    pair = Engine(url), Engine(url)
    yield pair
    for engine in pair:
        engine.close()


def test_what_one_stored_the_other_finds(engines: tuple[Engine, Engine]) -> None:
    first, second = engines
    first.put(100)
    first.written(BLOCKS)
    assert second.get(100) == 0
    assert second.fetch(second.keys())
    assert second.get(100) == BLOCKS
    counters = second.manager.counters()
    assert counters.remote_read_blocks == BLOCKS
    assert counters.remote_lookups == 1
    assert counters.remote_failures == counters.remote_corrupt_blocks == 0
    assert not second.fetch(second.keys()), "all is in host memory"


def test_a_tenant_does_not_find_what_another_stored(engines: tuple[Engine, Engine]) -> None:
    first, second = engines
    first.put(100, namespace=("tenant a",))
    first.written(BLOCKS)
    other = second.keys(namespace=("tenant b",))
    second.fetch(other)
    assert second.get(100, namespace=("tenant b",)) == second.get(100) == 0
    # Nor by name: the values of one prefix, asked for with another tenant's keys or a key made of them, are not there.
    assert second.manager.counters().remote_read_blocks == 0
    assert second.fetch(second.keys(namespace=("tenant a",)))
    assert second.get(100, namespace=("tenant a",)) == BLOCKS


def values(url: str) -> list[Path]:
    return sorted(path for path in Path(url.removeprefix("dir:")).rglob("*") if path.is_file())


def test_a_value_under_another_name_is_a_miss(url: str) -> None:
    """Whoever can write to the store gives one tenant's value the name of another's: the header says whose it is."""
    first, second = Engine(url), Engine(url)
    first.put(100, namespace=("tenant a",))
    first.put(500, namespace=("tenant b",))
    first.written(2 * BLOCKS)
    names = {path.name: path for path in values(url)}
    wanted, foreign = (first.keys(namespace=(tenant,)) for tenant in ("tenant a", "tenant b"))
    for at in range(0, len(wanted), 16):
        names[wanted[at : at + 16].hex()].write_bytes(names[foreign[at : at + 16].hex()].read_bytes())
    assert second.fetch(wanted)
    assert second.get(100, namespace=("tenant a",)) == 0
    assert second.manager.counters().remote_corrupt_blocks > 0
    first.close()
    second.close()


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "format"])
def test_a_wrong_value_is_a_miss_and_is_written_anew(url: str, damage: str) -> None:
    first, second = Engine(url), Engine(url)
    first.put(100)
    first.written(BLOCKS)
    bad = 5
    path = {path.name: path for path in values(url)}[first.keys()[16 * bad : 16 * bad + 16].hex()]
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[-1] ^= 1
    elif damage == "format":
        content[4] ^= 2
    path.write_bytes({"truncate": content[:-100], "empty": b""}.get(damage, content))
    assert second.fetch(second.keys())
    assert second.get(100) == bad
    wait_until(lambda: damage == "empty" or not path.exists())
    second.put(100)
    wait_until(lambda: path.exists() and len(path.read_bytes()) == len(content))
    third = Engine(url)
    assert third.fetch(third.keys())
    assert third.get(100) == BLOCKS
    for engine in (first, second, third):
        engine.close()


def test_a_reset_finds_nothing_of_before_and_shares_no_more(engines: tuple[Engine, Engine]) -> None:
    first, second = engines
    first.put(100)
    first.written(BLOCKS)
    second.manager.reset()
    second.fetch(second.keys())
    assert second.get(100) == 0
    second.put(300)
    second.written(BLOCKS)
    first.manager.blocks._cache.reset()
    assert first.fetch(first.keys())
    assert first.get(100) == BLOCKS, "what was written before the other's reset"
    second.manager.blocks._cache.reset()
    assert second.fetch(second.keys())
    assert second.get(300) == BLOCKS, "what it has written since"


def test_the_death_of_the_process_costs_misses_only(engines: tuple[Engine, Engine]) -> None:
    first, second = engines
    first.put(100)
    first.written(BLOCKS)
    pid = second.link.pid
    second.link._process.kill()
    second.fetch(second.keys())
    second.get(100)
    wait_until(lambda: second.link.pid not in (pid, -1))
    second.fetch(second.keys())
    assert second.get(100) == BLOCKS
    assert second.manager.counters().remote_restarts == 1


def test_requests_of_one_prefix_read_it_once(engines: tuple[Engine, Engine]) -> None:
    first, second = engines
    first.put(100)
    first.written(BLOCKS)
    ends = [threading.Event() for _ in range(6)]
    assert all(second.manager.blocks.fetch_keys(second.keys(), end.set) for end in ends)
    assert all(end.wait(10) for end in ends)
    assert second.get(100) == BLOCKS
    counters = second.manager.counters()
    assert (counters.remote_lookups, counters.remote_read_blocks) == (1, BLOCKS)


def test_what_is_not_there_is_not_asked_for_again_at_once(engines: tuple[Engine, Engine]) -> None:
    first, second = engines
    assert second.fetch(second.keys())
    assert not second.fetch(second.keys())
    assert second.manager.counters().remote_lookups == 1
    first.put(100)
    first.written(BLOCKS)
    wait_until(lambda: second.fetch(second.keys()))
    assert second.get(100) == BLOCKS, "a miss is not believed for long"


def test_short_prefixes_are_computed(url: str) -> None:
    first, second = Engine(url), Engine(url)
    second.manager.blocks._remote._policy._read_tokens_min = 4 * BLOCK_TOKENS
    first.put(100, TOKENS[: 3 * BLOCK_TOKENS])
    first.written(3)
    second.fetch(second.keys())
    assert second.manager.counters().remote_read_blocks == 0
    first.close()
    second.close()


def test_only_what_is_used_again_is_written(url: str) -> None:
    engine = Engine(url, remote_write="used_again")
    engine.put(100)
    time.sleep(0.7)
    assert not values(url)
    assert engine.get(100) == BLOCKS
    engine.written(BLOCKS)
    engine.close()


def test_what_another_wrote_is_not_written_again(engines: tuple[Engine, Engine], url: str) -> None:
    first, second = engines
    first.put(100)
    first.written(BLOCKS)
    before = {path: path.stat().st_mtime_ns for path in values(url)}
    second.put(100)
    second.written(BLOCKS)
    assert {path: path.stat().st_mtime_ns for path in values(url)} == before


def test_the_oldest_leave_a_full_queue(url: str) -> None:
    engine = Engine(url, remote_queue_bytes=1)
    engine.link._writes._write_blocks = engine.link._writes._queue_blocks = 4
    engine.link._writes.breaker._closed, engine.link._writes.breaker._until = False, float("inf")
    for seed in range(3):
        engine.put(1000 * seed, TOKENS[: 4 * BLOCK_TOKENS] + 10_000 * seed)
    engine.link._writes.breaker.succeeded()
    engine.written(4)
    time.sleep(0.6)
    counters = engine.manager.counters()
    assert (counters.remote_written_blocks, counters.remote_dropped_blocks) == (4, 8)
    engine.close()


def test_a_prefetch_by_tokens_brings_what_the_store_has(engines: tuple[Engine, Engine]) -> None:
    first, second = engines
    first.put(100)
    first.written(BLOCKS)
    task = second.manager.prefetch_async(TOKENS)
    response = second.manager.wait(task)[task]
    assert response.status is KVResponseStatus.SUCCESS
    assert response.return_mask is not None
    assert response.return_mask.all()
    assert second.get(100) == BLOCKS
    nothing = second.manager.prefetch_async(TOKENS + 7)
    assert second.manager.wait(nothing)[nothing].status is KVResponseStatus.SUCCESS


def test_pieces_are_hits_as_they_arrive_and_late_comers_follow(engines: tuple[Engine, Engine]) -> None:
    first, second = engines
    first.put(100)
    first.written(BLOCKS)
    second.link._piece_blocks = 4
    seen: list[int] = []
    ends: list[threading.Event] = []

    take_read = second.link._take_read

    def take_and_look(op: object) -> None:  # under the lock, each time blocks have come
        take_read(op)  # type: ignore[arg-type]
        seen.append(second.manager.blocks.match_keys(second.keys()))
        end = threading.Event()
        if second.manager.blocks.fetch_keys(second.keys(), end.set):
            ends.append(end)

    second.link._take_read = take_and_look  # type: ignore[method-assign]
    assert second.fetch(second.keys())
    wait_until(lambda: len(seen) == BLOCKS // 4)
    assert seen == list(range(4, BLOCKS + 1, 4))
    assert all(end.wait(10) for end in ends)
    assert second.get(100) == BLOCKS
    assert second.manager.counters().remote_read_blocks == BLOCKS, "nothing came twice"


def test_a_fetch_takes_no_more_than_its_share_of_host_memory(url: str) -> None:
    first, second = Engine(url), Engine(url)
    first.put(100)
    first.written(BLOCKS)
    second.link._piece_blocks, second.link._fetch_blocks_max = 5, 12
    assert second.fetch(second.keys())
    assert second.get(100) == 12
    first.close()
    second.close()
