"""What SGLang before 0.5.16 makes its cache with, once this project's patches have given it ``--enable-flexkv``."""

from flexkv_sglang.backend import make_cache

__all__ = ["make_cache"]
