"""What is worth writing to a store that several machines share, and what is worth reading from it."""

from __future__ import annotations

from abc import ABC, abstractmethod

from flexkv_core.config import FlexKVConfig


class RemotePolicy(ABC):
    """Decides; knows no store and moves nothing. Called under the manager's lock, so it computes and waits for nothing. A cost model
    of loading and recomputing can take the place of thresholds here."""

    @abstractmethod
    def writes_stored(self, tokens: int) -> bool:
        """Whether a sequence of this many tokens is written, whose last blocks were computed and stored just now."""

    @abstractmethod
    def writes_used(self, tokens: int) -> bool:
        """Whether a sequence of this many tokens is written, which was stored before and is used again."""

    @abstractmethod
    def reads(self, tokens: int) -> bool:
        """Whether this many tokens, which only the store has, are read rather than computed. Asked before the store is, too: with
        the most that it could have."""


class ThresholdPolicy(RemotePolicy):
    """The configuration's switches and thresholds."""

    def __init__(self, config: FlexKVConfig) -> None:
        self._write = config.remote_write
        self._write_tokens_min = config.remote_write_tokens_min
        self._read_tokens_min = config.remote_read_tokens_min

    def writes_stored(self, tokens: int) -> bool:
        """See the base."""
        return self._write == "stored" and tokens >= self._write_tokens_min

    def writes_used(self, tokens: int) -> bool:
        """See the base. What is written when it is stored is offered again too: the store may have lost it, or been away then."""
        return self._write != "never" and tokens >= self._write_tokens_min

    def reads(self, tokens: int) -> bool:
        """See the base."""
        return tokens >= self._read_tokens_min
