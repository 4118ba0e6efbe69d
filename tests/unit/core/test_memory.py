"""The host segment: shared, sized to what there is, and gone with its processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from flexkv_core.errors import CapacityError
from flexkv_core.layout import KVLayout
from flexkv_core.storage import memory
from flexkv_core.storage.memory import HostSegment, slots_within

LAYOUT = KVLayout(tokens_per_block=16, device_block_tokens=16, device_block_bytes=5000, shard_count=2)


def slot_bytes(segment: HostSegment, slot: int) -> np.ndarray:
    import ctypes

    address = segment.address + slot * segment.layout.slot_bytes
    return np.ctypeslib.as_array((ctypes.c_uint8 * segment.layout.slot_bytes).from_address(address))


def test_two_mappings_see_the_same_bytes() -> None:
    owner = HostSegment.create(8, LAYOUT)
    other = HostSegment.attach(owner.handle)
    slot_bytes(owner, 7)[:] = 42
    owner.checksums[7, 1] = 99
    assert (slot_bytes(other, 7) == 42).all()
    assert other.checksums[7, 1] == 99
    owner.close()
    assert (slot_bytes(other, 7) == 42).all()  # the memory lives as long as one maps it
    other.close()


def test_budget_covers_slots_and_checksums() -> None:
    for budget in (3 << 20, 64 << 20, 1 << 30):
        count = slots_within(budget, LAYOUT)
        assert memory.segment_bytes(count, LAYOUT) <= budget + memory.HUGE_PAGE_BYTES
        assert count * LAYOUT.slot_bytes > budget * 0.9 - 4 * memory.HUGE_PAGE_BYTES


def test_more_than_the_machine_has_is_refused_before_anything_is_taken() -> None:
    before = len(os.listdir("/proc/self/fd"))
    count = memory.available_bytes() // LAYOUT.slot_bytes
    with pytest.raises(CapacityError, match=r"host_bytes: \d+ bytes asked for, \d+ bytes are available"):
        HostSegment.create(count, LAYOUT)
    assert len(os.listdir("/proc/self/fd")) == before


def test_missing_huge_pages_are_named() -> None:
    if memory._meminfo("HugePages_Free"):
        pytest.skip("this machine has huge pages")
    with pytest.raises(CapacityError, match=r"raise vm\.nr_hugepages to at least \d+"):
        HostSegment.create(8, LAYOUT, huge_pages=True)


def test_huge_pages_back_the_segment() -> None:
    setting = Path("/proc/sys/vm/nr_hugepages")
    if not os.access(setting, os.W_OK):
        pytest.skip("huge pages can be reserved by root only")
    before = setting.read_text()
    setting.write_text("8")
    try:
        if memory._meminfo("HugePages_Free") < 8:
            pytest.skip("the machine has no contiguous memory left for huge pages")
        segment = HostSegment.create(8, LAYOUT, huge_pages=True)
        slot_bytes(segment, 0)[:] = 1
        kinds = Path("/proc/self/smaps").read_text().split("flexkv-host-tier")[1:]
        assert any("KernelPageSize:     2048 kB" in kind.split("VmFlags")[0] for kind in kinds)
        segment.close()
    finally:
        setting.write_text(before)


def test_attach_to_a_process_that_is_gone() -> None:
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    child.wait()
    handle = memory.SegmentHandle(memory.Descriptor(child.pid, 3, 1), 8, LAYOUT, False)
    with pytest.raises(CapacityError, match="cannot be opened"):
        HostSegment.attach(handle)


def mapped_by(inode: str) -> set[str]:
    """Processes that map the segment with this inode."""
    found = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        try:
            lines = maps.read_text().splitlines()
        except OSError:  # ended meanwhile
            continue
        if any("flexkv-host-tier" in line and line.split()[4] == inode for line in lines):
            found.add(maps.parent.name)
    return found


def test_nothing_is_left_after_sigkill() -> None:
    """The segment has no name, so with the last process that maps it nobody and nothing refers to it."""
    code = (
        "import os, time\n"
        "from flexkv_core.layout import KVLayout\n"
        "from flexkv_core.storage.memory import HostSegment\n"
        "segment = HostSegment.create(4000, KVLayout(16, 16, 5000))\n"
        "segment.populate()\n"
        "segment._populator.join()\n"
        "print(os.fstat(segment.handle.memory.fd).st_ino, flush=True)\n"
        "time.sleep(60)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment)
    assert child.stdout is not None
    inode = child.stdout.readline().decode().strip()
    assert mapped_by(inode) == {str(child.pid)}
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert mapped_by(inode) == set()
    assert not [name for name in os.listdir("/dev/shm") if "flexkv" in name]
