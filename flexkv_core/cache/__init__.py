"""The control plane: which blocks are where, who is using them, and what goes when room is short.

Pure memory: no I/O, no clock, no thread of its own. The caller holds one lock around every call of :class:`GlobalCacheEngine`.

- ``engine.py``      match, plan, commit and abort; the only module that others import
- ``plans.py``       what the engine hands out: leases, plans, counters
- ``radix_tree.py``  the tree of path-compressed runs, and its Python twin
- ``mempool.py``     fixed-size slots of one tier
- ``eviction/``      which run goes first; one file a policy
- ``integrity.py``   recounts everything and says what differs
"""

from flexkv_core.cache.engine import GlobalCacheEngine
from flexkv_core.cache.plans import CacheStats, GetPlan, Lease, PutPlan

__all__ = ["CacheStats", "GetPlan", "GlobalCacheEngine", "Lease", "PutPlan"]
