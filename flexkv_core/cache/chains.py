"""From loose blocks, each with the key before it, to runs: the warm start of the Python index."""

from __future__ import annotations

from flexkv_core.types import KEY_BYTES

ROOT = bytes(KEY_BYTES)
"""Stands for "nothing" as the parent of a sequence's first block."""

BuiltRun = tuple[int, list[int], int]
"""(place of the parent in the list, or -1; positions of the blocks; the newest age at or below the run)."""


def build_runs(keys: bytes, parents: bytes, ages: list[int]) -> tuple[list[BuiltRun], list[int]]:
    """The runs, parents before children, and the positions of the blocks that are in none.

    A run goes on as long as its last block has exactly one child.
    """
    names = [keys[i : i + KEY_BYTES] for i in range(0, len(keys), KEY_BYTES)]
    place: dict[bytes, int] = {}
    for i, name in enumerate(names):
        if name != ROOT:
            place.setdefault(name, i)
    children: dict[int, list[int]] = {-1: []}
    for i, name in enumerate(names):
        parent = parents[KEY_BYTES * i : KEY_BYTES * (i + 1)]
        above = -1 if parent == ROOT else place.get(parent)
        if above is not None and place.get(name) == i:
            children.setdefault(above, []).append(i)
    found = [False] * len(names)
    built: list[tuple[int, list[int]]] = []
    waiting = [(-1, root) for root in reversed(children[-1])]
    while waiting:
        above, block = waiting.pop()
        blocks = [block]
        while len(below := children.get(blocks[-1], [])) == 1:
            blocks.append(below[0])
        for block in blocks:
            found[block] = True
        waiting.extend((len(built), child) for child in reversed(below))
        built.append((above, blocks))
    return _with_ages(built, ages), [i for i, known in enumerate(found) if not known]


def _with_ages(built: list[tuple[int, list[int]]], ages: list[int]) -> list[BuiltRun]:
    newest = [max(ages[block] for block in blocks) for _, blocks in built]
    for i in range(len(built) - 1, -1, -1):
        above = built[i][0]
        if above >= 0:
            newest[above] = max(newest[above], newest[i])
    return [(above, blocks, age) for (above, blocks), age in zip(built, newest, strict=True)]
