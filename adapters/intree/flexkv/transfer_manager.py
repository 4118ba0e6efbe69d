"""Ranks on other machines, which are not served through SGLang's own code."""

from __future__ import annotations

from typing import NoReturn

from flexkv_core.errors import ConfigError


class TransferManagerOnRemote:
    """Refuses to start."""

    @classmethod
    def create_process(cls, **options: object) -> NoReturn:
        """Raises ConfigError: --enable-flexkv serves one process."""
        raise ConfigError(f"FlexKV: --enable-flexkv serves one machine; found {options}")
