"""Loads layer by layer through SGLang's own code are not served; the native adapter is the way to them."""

from __future__ import annotations


def build_layerwise_eventfd_socket_path(
    dp_client_id: int = 0, pp_rank: int = 0, model_config: object = None
) -> str:
    """A name that nobody listens on: callers ask for it whether or not they load layer by layer."""
    return f"flexkv-layerwise-is-off-{dp_client_id}-{pp_rank}"
