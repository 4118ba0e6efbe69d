"""Which weights a model's name stands for: what was stored under other weights must not be found after a restart."""

from __future__ import annotations

from pathlib import Path

import xxhash

_WEIGHT_FILES = ("*.safetensors", "*.bin", "*.pt", "*.gguf", "config.json")


def weights_identity(model: str, revision: str | None) -> str | None:
    """Changes when the weights do: for a folder from the names, sizes and times of its files, for a name on the hub the commit that
    lies in the local cache; None where neither is known (the weights come from elsewhere, and only the name and revision tell)."""
    folder = Path(model)
    if folder.is_dir():
        return _files_digest(folder)
    if folder.is_file():
        return _files_digest(folder.parent)
    return _hub_commit(model, revision)


def _files_digest(folder: Path) -> str:
    digest = xxhash.xxh3_128()
    for path in sorted(found for pattern in _WEIGHT_FILES for found in folder.glob(pattern)):
        stat = path.stat()
        digest.update(f"{path.name}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode())
    return digest.hexdigest()


def _hub_commit(model: str, revision: str | None) -> str | None:
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:  # an engine brings it
        return None
    try:
        found = try_to_load_from_cache(model, "config.json", revision=revision)
    except ValueError:  # not a name that the hub could have
        return None
    return Path(found).parent.name if isinstance(found, str) else None
