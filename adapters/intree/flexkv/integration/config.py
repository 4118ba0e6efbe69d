"""``FlexKVConfig``: what SGLang's own code asks for its settings."""

from flexkv_sglang.in_tree import InTreeConfig as FlexKVConfig

__all__ = ["FlexKVConfig"]
