"""What vLLM's in-tree class asks of the object behind it, and which module ``flexkv`` that is."""

from __future__ import annotations

import ast
import inspect
import logging
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1
from vllm.distributed.kv_transfer.kv_connector.v1.flexkv_connector import FlexKVConnectorV1

from flexkv.integration.vllm.vllm_v1_adapter import FlexKVConnectorV1Impl
from flexkv_core.errors import ConfigError
from flexkv_core.module_owner import Owner
from flexkv_vllm import plugin
from flexkv_vllm.compat import in_tree
from flexkv_vllm.connector import FlexKVConnector
from flexkv_vllm.preflight import check_before_weights

OTHERS = "class FlexKVConnectorV1Impl:\n    pass\n"


def calls_of_the_in_tree_class() -> dict[str, int]:
    """Methods that vLLM calls on the object behind its class -> the positional arguments that it passes."""
    found = {}
    for node in ast.walk(ast.parse(inspect.getsource(FlexKVConnectorV1))):
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("self._flexkv_connector."):
            found[ast.unparse(node.func).rpartition(".")[2]] = len(node.args)
    return found


def other_flexkv(folder: Path) -> None:
    """A package ``flexkv`` of somebody else, as vLLM would import it."""
    door = folder / "flexkv" / "integration" / "vllm"
    door.mkdir(parents=True)
    for package in (door, door.parent, door.parent.parent):
        (package / "__init__.py").touch()
    (door / "vllm_v1_adapter.py").write_text(OTHERS)


@pytest.fixture
def others_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    other_flexkv(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [name for name in sys.modules if name.partition(".")[0] == "flexkv"]:
        monkeypatch.delitem(sys.modules, name)
    return tmp_path / "flexkv"


def test_each_call_of_the_in_tree_class_fits_a_method() -> None:
    calls = calls_of_the_in_tree_class()
    assert len(calls) >= 15, "the scan found too little to mean anything"
    for name, count in calls.items():
        method = getattr(FlexKVConnectorV1Impl, name)
        inspect.signature(method).bind(None, *range(count))


def test_completed_class_has_every_hook_of_the_native_one() -> None:
    """No hook of our connector may end in vLLM's default."""
    completed = in_tree.complete(FlexKVConnectorV1)
    assert issubclass(completed, FlexKVConnectorV1)
    assert completed.__name__ == "FlexKVConnectorV1"
    ours = [name for name in dir(KVConnectorBase_V1) if _defined_by(FlexKVConnector, name)]
    assert len(ours) >= 20
    for name in ours:
        assert _defined_by(completed, name), f"{name} would stay with vLLM's default"
    for base in FlexKVConnector.__bases__:
        assert issubclass(completed, base)


def _defined_by(connector: type, name: str) -> bool:
    """Whether a class below vLLM's base class defines ``name``."""
    if name.startswith("__"):
        return False
    first = next((base for base in connector.__mro__ if name in vars(base)), None)
    return first is not None and first not in KVConnectorBase_V1.__mro__


def test_plugin_puts_the_completed_class_in_its_place_once() -> None:
    plugin.register()
    plugin.register()
    found = KVConnectorFactory.get_connector_class_by_name(in_tree.NAME)
    assert found is KVConnectorFactory.get_connector_class_by_name(in_tree.NAME)
    assert found is not FlexKVConnectorV1
    assert issubclass(found, FlexKVConnectorV1)


def test_without_the_plugin_it_is_refused_with_the_reason() -> None:
    with pytest.raises(ConfigError, match="add flexkv to VLLM_PLUGINS"):
        FlexKVConnectorV1Impl(SimpleNamespace(), SimpleNamespace())


def test_our_own_module_is_known() -> None:
    owner, folder = in_tree.owner()
    assert owner is Owner.OURS
    assert folder is not None
    assert folder.parts[-2:] == ("intree", "flexkv")


def test_module_of_another_distribution_is_left_alone_and_said(
    others_first: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert in_tree.owner() == (Owner.OTHERS, others_first)

    def load() -> type:
        return FlexKVConnectorV1

    registry = {in_tree.NAME: load}
    monkeypatch.setattr(KVConnectorFactory, "_registry", registry)
    plugin.register()
    assert registry[in_tree.NAME] is load, "theirs"
    assert KVConnectorFactory.get_connector_class_by_name("FlexKVConnector") is FlexKVConnector, "ours"
    transfer = SimpleNamespace(
        kv_connector=in_tree.NAME, kv_connector_extra_config={"a key": "of their configuration"}
    )
    with caplog.at_level(logging.WARNING, "flexkv_vllm.preflight"):
        check_before_weights(SimpleNamespace(kv_transfer_config=transfer), memory=False)
    assert f"will use the module flexkv in {others_first}, which is not of this project" in caplog.text
    assert '"kv_connector":"FlexKVConnector"' in caplog.text


def test_files_of_another_distribution_over_ours_are_noticed(others_first: Path) -> None:
    (others_first / "ours.py").touch()  # what an overwritten installation leaves beside them
    assert in_tree.owner()[0] is Owner.OTHERS


def test_name_is_ours_where_vllm_has_no_such_class(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(KVConnectorFactory, "_registry", {})
    plugin.register()
    assert KVConnectorFactory.get_connector_class_by_name(in_tree.NAME) is FlexKVConnector
