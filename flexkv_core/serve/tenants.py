"""The managers of a server: one for each identity (model, layout, namespace …), made when its first client introduces itself."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ByteSize

from flexkv_core.block_manager import BlockManager, ModelConfig, root_key
from flexkv_core.config import FlexKVConfig
from flexkv_core.errors import FlexKVError
from flexkv_core.layout import KVLayout
from flexkv_core.quantised import store_dtype_of
from flexkv_core.serve.relay import RelayExecutor
from flexkv_core.serve.session import Tenant
from flexkv_core.serve.wire import VERSION, WireError

logger = logging.getLogger(__name__)

REMOTE_START_S = 5.0
"""How long the first client of a model waits for the client of the store, whose libraries take about a second to load: what its first requests
do not find they compute and write again."""


@dataclass(frozen=True)
class Greeting:
    """What a client says of itself: the payload of HELLO.

    ``root``: its root key, which both sides compute. ``name``: for people.
    """

    model: ModelConfig
    namespace: str
    root: bytes
    name: str

    def pack(self) -> bytes:
        """As JSON."""
        return json.dumps(
            {
                "version": VERSION,
                "identity": dict(self.model.identity),
                "layout": self.model.layout.as_dict(),
                "namespace": self.namespace,
                "root": self.root.hex(),
                "name": self.name,
            }
        ).encode()

    @classmethod
    def unpack(cls, payload: memoryview) -> Greeting:
        """The other way.

        Raises:
            WireError: something is missing or wrong, or the client speaks another version.
        """
        try:
            values: dict[str, Any] = json.loads(payload.tobytes())
            if values["version"] != VERSION:
                raise WireError(
                    f"version {values['version']!r} of the protocol; this server speaks {VERSION}"
                )
            model = ModelConfig(dict(values["identity"]), KVLayout(**values["layout"]))
            root = bytes.fromhex(values["root"])
            greeting = cls(model, str(values["namespace"]), root, str(values["name"])[:200])
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise WireError(f"the greeting cannot be read: {error!r}") from error
        if root_key(model, greeting.namespace) != root:
            raise WireError("the client's fingerprint is another one: it runs another version of FlexKV")
        return greeting


class Tenants:
    """See the module's text. All methods run on the server's thread.

    Args:
        config: of each manager; ``host_bytes`` and ``ssd_bytes`` are divided among ``count_max``.
        on_ready: called on any thread with the root of a manager that is ready, or failed to start: ask :meth:`find` again.
    """

    def __init__(self, config: FlexKVConfig, count_max: int, on_ready: Callable[[], None]) -> None:
        self._config = config
        self._count_max = count_max
        self._on_ready = on_ready
        self._ready: dict[bytes, Tenant] = {}
        self._starting: dict[bytes, threading.Thread] = {}
        self._failed: dict[bytes, str] = {}

    @property
    def all(self) -> Mapping[bytes, Tenant]:
        """Those that are ready, by their roots."""
        return dict(self._ready)

    def find(self, greeting: Greeting) -> Tenant | None:
        """The greeting's; None while it starts, ``on_ready`` will be called.

        Raises:
            FlexKVError: there is no room for another identity, or this one's memory or disk cannot be had.
        """
        root = greeting.root
        if root in self._ready:
            return self._ready[root]
        if root in self._failed:
            raise FlexKVError(self._failed.pop(root))
        if root not in self._starting:
            if len(self._ready) + len(self._starting) >= self._count_max:
                held = "; ".join(tenant.name for tenant in self._ready.values())
                raise FlexKVError(
                    f"this server is for {self._count_max} model(s) and has [{held}]; yours is [{_words(greeting)}]. Models share only when"
                    " everything that enters their keys agrees; start one server a model, or this one with a higher --models"
                )
            self._starting[root] = threading.Thread(
                target=self._start, args=(greeting,), name="flexkv-start", daemon=True
            )
            self._starting[root].start()
        return None

    def close(self) -> None:
        """Write what waits for the SSDs, at most ten seconds, and give the memory back."""
        for starting in list(self._starting.values()):
            starting.join()
        threads = [threading.Thread(target=tenant.manager.shutdown) for tenant in self._ready.values()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _start(self, greeting: Greeting) -> None:
        """Runs on a thread of its own: taking memory and opening disks takes seconds."""
        share = {
            "namespace": greeting.namespace,
            "host_bytes": ByteSize(self._config.host_bytes // self._count_max),
            "ssd_bytes": ByteSize(self._config.ssd_bytes // self._count_max),
            # What the slots hold is the engines' choice; the server only keeps them.
            "store_dtype": store_dtype_of(greeting.model.layout),
        }
        relay = RelayExecutor()
        try:
            manager = BlockManager(
                greeting.model,
                self._config.model_copy(update=share),
                relay,
                # Later than any number of an earlier server's: its clients' workers may still mark the ends of its tasks.
                first_task=time.time_ns() // 1000,
            )
            manager.start()
            if not manager.wait_remote(REMOTE_START_S):
                logger.warning(
                    "the store's client is not there yet; requests go without the store until it is"
                )
        except (FlexKVError, OSError) as error:  # descriptors may be short
            logger.error("no manager for %s: %s", _words(greeting), error)
            self._failed[greeting.root] = str(error)
        else:
            self._ready[greeting.root] = Tenant(_words(greeting), manager, relay)
            logger.info("serving %s", _words(greeting))
        self._starting.pop(greeting.root)
        self._on_ready()


def _words(greeting: Greeting) -> str:
    """What tells it from others, for people: the values of its identity that are short."""
    short = {key: value for key, value in greeting.model.identity.items() if len(str(value)) < 80}
    if greeting.namespace:
        short["namespace"] = greeting.namespace
    return ", ".join(f"{key} {value}" for key, value in short.items())
