"""The control plane: which blocks are where, who is using them, and what goes when room is short.

Pure memory: no I/O, no clock, no thread of its own. The caller holds one lock around every call of :class:`GlobalCacheEngine`.

- ``engine.py``      match, plan, commit and abort; the only module that others import
- ``plans.py``       what the engine hands out: leases, plans, counters
- ``radix_tree.py``  the tree of path-compressed runs, and its Python twin
- ``residency.py``   the index and all that must agree with it: pools, eviction orders, the queue of writes
- ``write_behind.py`` what goes to the SSD next; ``write_queue.py`` what waits for it
- ``tier_events.py`` what came to each tier and left it, for who keeps a view of it elsewhere
- ``leases.py``      what each live plan keeps
- ``chains.py``      from loose blocks to runs, for the warm start
- ``mempool.py``     fixed-size slots of one tier
- ``eviction/``      which run goes first; one file a policy
- ``integrity.py``   recounts everything and says what differs
"""

from flexkv_core.cache.chains import ROOT
from flexkv_core.cache.engine import GlobalCacheEngine
from flexkv_core.cache.plans import CacheStats, GetPlan, Lease, PutPlan, Reads, WritePlan
from flexkv_core.cache.tier_events import EventKind, TierEvent

__all__ = [
    "ROOT",
    "CacheStats",
    "EventKind",
    "GetPlan",
    "GlobalCacheEngine",
    "Lease",
    "PutPlan",
    "Reads",
    "TierEvent",
    "WritePlan",
]
