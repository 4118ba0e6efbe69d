"""FlexKV for SGLang's own ``--enable-flexkv`` (0.5.16 and later): what the modules of ``adapters/intree/flexkv`` hand to it.

SGLang's code passes tokens only. What else separates requests comes through hooks on its cache, which :class:`InTreeConfig` puts in before
anything is served; a call without them finds and stores nothing. One process is served, loads are whole; more is the native adapter's.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from flexkv_core.block_manager import ModelConfig
from flexkv_core.config import FlexKVConfig, load_config
from flexkv_core.errors import ConfigError, FlexKVError
from flexkv_core.keys import hash_tokens, namespace_root
from flexkv_core.manager import Blocks
from flexkv_core.quantised import check_quantisable
from flexkv_core.serve.choice import open_blocks
from flexkv_core.tasks import KVResponse, TaskDone
from flexkv_core.token_tasks import first_true, token_array
from flexkv_core.transfer.cpus import engine_cpus
from flexkv_core.weights import weights_identity
from flexkv_kernels import copier_over
from flexkv_kernels.segments import pieces_of
from flexkv_sglang.compat import in_tree_hooks
from flexkv_sglang.compat.in_tree_hooks import current_namespace
from flexkv_sglang.layout import check_engine, layout_for, server_identity
from flexkv_sglang.stats import PromMetrics

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

_WAIT_S = 0.0005
_PORT = "in-process"
_managers: dict[str, InTreeManager] = {}  # by port: the only one that listens there


@dataclass(frozen=True)
class InTreeModel:
    """The topology, in the names that SGLang's code reads; one process."""

    identity: Mapping[str, object]
    config: FlexKVConfig
    page_size: int
    use_mla: bool
    enable_metrics: bool = False
    model_path: str = ""
    nnodes: int = 1
    pp_size: int = 1
    attn_tp_size: int = 1
    attn_cp_size: int = 1
    tp_size_per_node: int = 1
    master_host: str = ""
    master_ports: tuple[int, ...] = ()


@dataclass(frozen=True)
class InTreeRank:
    """This process's place in it."""

    model_config: InTreeModel
    num_layers_per_pp_stage: int
    dp_client_id: int = 0
    pp_rank: int = 0
    pp_size_per_node: int = 1
    node_rank: int = 0
    local_rank: int = 0
    tp_rank_per_node: int = 0
    attn_tp_rank: int = 0
    attn_cp_rank: int = 0


@dataclass(frozen=True)
class InTreeTiers:
    """What SGLang's code asks of the tiers. Their sizes are the manager's business."""

    enable_ssd: bool
    enable_remote: bool = False
    enable_kv_sharing: bool = False


class InTreeConfig:
    """Settings from the environment and the file that ``--flexkv-config-file`` or ``FLEXKV_CONFIG_PATH`` names."""

    server_recv_port = gpu_register_port = _PORT

    def __init__(self, config: FlexKVConfig) -> None:
        self._config = config
        self.cache_config = InTreeTiers(enable_ssd=bool(config.ssd_dirs))

    @classmethod
    def from_env(cls) -> InTreeConfig:
        """Raises ConfigError with everything that is wrong."""
        return cls(load_config())

    def post_init_from_sglang_config(
        self, *, sglang_config: Any, server_args: Any, page_size: int, dp_rank: int = 0, **ranks: int
    ) -> InTreeRank:
        """Take in what SGLang serves, and put the hooks into its cache.

        Raises:
            ConfigError: more than one process, a draft model, or settings that do not fit.
        """
        _check_in_tree(server_args, self._config)
        in_tree_hooks.install(_managers.values)
        loras = [
            ref.lora_path
            for ref in getattr(server_args, "lora_paths", None) or ()
            if hasattr(ref, "lora_path")
        ]
        identity = {
            **server_identity(server_args, self._config),
            "path": "in-tree",
            "loras": [(path, weights_identity(path, None)) for path in loras],
        }
        is_mla = str(getattr(sglang_config, "attention_arch", "")).endswith("MLA")
        self.model_config = InTreeModel(
            identity,
            self._config,
            page_size,
            is_mla,
            enable_metrics=bool(getattr(server_args, "enable_metrics", False)),
            model_path=server_args.model_path,
        )
        return InTreeRank(self.model_config, sglang_config.num_hidden_layers, dp_client_id=dp_rank)


class DeviceClient:
    """Hands the KV tensors of this process to its manager."""

    def __init__(
        self, gpu_register_port: str, dp_client_id: int = 0, pp_rank: int = 0, device_id: int = 0
    ) -> None:
        self._port = gpu_register_port

    def register_to_server(
        self,
        kv_caches: Sequence[torch.Tensor],
        kv_layout: Any,
        indexer_buffers: Sequence[torch.Tensor] | None = None,
        indexer_layout: Any = None,
    ) -> None:
        """Open the tiers. What cannot be ends the process: the caller would only try again for minutes."""
        if indexer_buffers:
            raise SystemExit("FlexKV: --enable-flexkv does not serve models with a sparse index")
        try:
            _managers[self._port].open(kv_caches, kv_layout)
        except FlexKVError as error:
            raise SystemExit(f"FlexKV: {error}") from error

    def set_slot_mapping(self, task_id: int, slots: object) -> None:
        """Of ranks on other machines, of which there are none."""
        raise AssertionError("one process is served")


@dataclass
class _Task:
    """The blocks that a task moves begin at ``start``; its tokens at ``first`` >= ``start`` in tokens."""

    first: int
    start: int
    count: int
    ended: list[TaskDone] = field(default_factory=list)
    launched: bool = False


class InTreeManager:
    """Gets and puts by tokens, in the namespace of the request that SGLang's cache works on. One thread, the scheduler's.

    A task that finds nothing has the id -1 and a mask without a True.
    """

    def __init__(
        self,
        model_config: InTreeModel,
        cache_config: InTreeTiers,
        dp_client_id: int = 0,
        server_recv_port: str = _PORT,
        gpu_register_port: str = _PORT,
    ) -> None:
        self._model, self._replica, self._port = model_config, dp_client_id, gpu_register_port
        self.blocks: Blocks | None = None
        self.root = b""
        self._tasks: dict[int, _Task] = {}
        self._metrics: PromMetrics | None = None

    def start(self) -> None:
        """Wait for the device, which :class:`DeviceClient` brings."""
        _managers[self._port] = self

    def open(self, tensors: Sequence[torch.Tensor], layout: Any) -> None:
        """Take the tiers for these tensors, ``[slots, heads, head_dim]`` each.

        Raises:
            FlexKVError: the tensors, the memory or a directory cannot be used.
        """
        page, config = self._model.page_size, self._model.config
        pages = [
            tensor[: layout.num_block * page].unflatten(0, (layout.num_block, page)) for tensor in tensors
        ]
        segments = pieces_of(pages)
        if config.store_dtype == "fp8":
            check_quantisable(str(tensors[0].dtype).removeprefix("torch."))
        shape = layout_for(segments, page, config)
        identity = {**self._model.identity, "kv": repr(layout), "kv_dtype": str(tensors[0].dtype)}
        copier = copier_over(segments, tensors[0].device, list(tensors), shape.scales)
        cpus = engine_cpus() if tensors[0].device.type == "cpu" else None
        blocks = open_blocks(ModelConfig(identity, shape, self._replica), config, copier, cpus=cpus)
        blocks.start()
        self.blocks, self.root = blocks, blocks.root
        if self._model.enable_metrics:
            labels = {
                "model_name": self._model.model_path,
                "tp_rank": "0",
                "dp_rank": str(self._replica),
            }
            self._metrics = PromMetrics(blocks, labels)

    def is_ready(self) -> bool:
        """Whether the device has come."""
        return self.blocks is not None

    def get_match(
        self, token_ids: npt.NDArray[np.int64], token_mask: npt.NDArray[np.bool_] | None = None
    ) -> tuple[int, npt.NDArray[np.bool_]]:
        """Find and pin what follows the mask's first True; the task, and bool [tokens], True for what :meth:`launch` will load."""
        tokens, blocks, keys = self._keys(token_ids)
        first = first_true(token_mask, len(tokens))
        task = _Task(first, first // blocks.layout.tokens_per_block, 0)
        task_id, task.count = blocks.get_keys(keys, task.start, task.ended.append)
        stop = (task.start + task.count) * blocks.layout.tokens_per_block
        return self._remember(task_id, task, first, stop, len(tokens))

    def put_match(
        self, token_ids: npt.NDArray[np.int64], token_mask: npt.NDArray[np.bool_] | None = None
    ) -> tuple[int, npt.NDArray[np.bool_]]:
        """Reserve room for what is new; the task, and bool [tokens], True for what :meth:`launch` will store."""
        assert token_mask is None
        tokens, blocks, keys = self._keys(token_ids)
        task = _Task(0, 0, 0)
        task_id, task.start, task.count = blocks.put_keys(keys, task.ended.append)
        size = blocks.layout.tokens_per_block
        task.first = task.start * size
        return self._remember(task_id, task, task.first, task.first + task.count * size, len(tokens))

    def launch(
        self,
        task_ids: Sequence[int],
        slot_mappings: Sequence[Any],
        as_batch: bool = False,
        layerwise_transfer: bool = False,
        counter_id: int = 0,
    ) -> None:
        """Start the copies; a mapping holds the slots of the tokens of the task's mask."""
        assert not layerwise_transfer, "loads are whole"
        blocks = self._open_blocks()
        page, per_block = blocks.layout.device_block_tokens, blocks.layout.blocks_per_slot
        for task_id, slots in zip(task_ids, slot_mappings, strict=True):
            task = self._tasks[task_id]
            found = np.asarray(slots, np.int64)[::page] // page
            skipped = task.first // page - task.start * per_block  # these the device holds already
            pages = np.concatenate([np.full(skipped, -1, np.int64), found])
            task.launched = True
            blocks.launch_blocks(task_id, pages)

    def wait(
        self, task_ids: Iterable[int], timeout: float = 20.0, completely: bool = False
    ) -> dict[int, KVResponse]:
        """Wait for all; a task that is late is given up, and waited for until it writes no more, which is bounded by its own deadline."""
        ids, deadline = list(task_ids), time.monotonic() + timeout
        while any(not task.ended for task in self._of(ids)) and time.monotonic() < deadline:
            time.sleep(_WAIT_S)
        late = [task_id for task_id in ids if task_id in self._tasks and not self._tasks[task_id].ended]
        self._cancel(late)
        while any(not task.ended for task in self._of(late)) and time.monotonic() < deadline + timeout:
            time.sleep(_WAIT_S)
        return self.try_wait(ids)

    def try_wait(self, task_ids: Iterable[int]) -> dict[int, KVResponse]:
        """Those that have ended; they are forgotten."""
        ended = [task_id for task_id in task_ids if task_id in self._tasks and self._tasks[task_id].ended]
        return {task_id: KVResponse(self._tasks.pop(task_id).ended[0].status, task_id) for task_id in ended}

    def cancel(self, task_ids: Iterable[int]) -> None:
        """Give up matches that will not be launched."""
        self._cancel(task_ids)
        for task_id in task_ids:
            task = self._tasks.get(task_id)
            if task is not None and not task.launched:
                del self._tasks[task_id]

    def prefetch_async(self, token_ids: npt.NDArray[np.int64]) -> int:
        """Read into host memory what lies below it."""
        _, blocks, keys = self._keys(token_ids)
        task = _Task(0, 0, 0, launched=True)
        task_id, reads = blocks.prefetch_keys(keys, 0, task.ended.append)
        if not reads:
            return -1
        self._tasks[task_id] = task
        return task_id

    def shutdown(self) -> None:
        """Give the tiers back."""
        _managers.pop(self._port, None)
        if self.blocks is not None:
            self.blocks.shutdown()

    def _keys(self, token_ids: npt.NDArray[np.int64]) -> tuple[Any, Blocks, bytes]:
        """The tokens, the manager, and the tokens' keys: none where nobody says whose they are, so that nothing is found or stored."""
        tokens, blocks, namespace = token_array(token_ids), self._open_blocks(), current_namespace()
        if self._metrics is not None:
            self._metrics.update()
        if namespace is None:
            return tokens, blocks, b""
        root = namespace_root(self.root, namespace)
        return tokens, blocks, hash_tokens(root, tokens, blocks.layout.tokens_per_block)

    def _remember(
        self, task_id: int, task: _Task, first: int, stop: int, tokens: int
    ) -> tuple[int, npt.NDArray[np.bool_]]:
        mask = np.zeros(tokens, np.bool_)
        if not task.count or stop <= first:
            if task.count:
                self._cancel([task_id])
            return -1, mask
        mask[first:stop] = True
        self._tasks[task_id] = task
        return task_id, mask

    def _cancel(self, task_ids: Iterable[int]) -> None:
        for task_id in task_ids:
            self._open_blocks().cancel(task_id)

    def _of(self, task_ids: Iterable[int]) -> list[_Task]:
        return [self._tasks[task_id] for task_id in task_ids if task_id in self._tasks]

    def _open_blocks(self) -> Blocks:
        assert self.blocks is not None, "no device was registered"
        return self.blocks


def _check_in_tree(server_args: Any, config: FlexKVConfig) -> None:
    for name in ("tp_size", "pp_size", "dp_size", "nnodes"):
        if getattr(server_args, name) != 1:
            raise ConfigError(
                f"FlexKV: --enable-flexkv serves one process; {name} is {getattr(server_args, name)}. Use --radix-cache-backend flexkv-tiered"
            )
    check_engine(server_args, config)
