"""Configuration: one validated, frozen model and the four places that it is read from.

Order of precedence, highest first:

1. the mapping that the caller gives (vLLM's ``kv_connector_extra_config``),
2. environment variables ``FLEXKV_<KEY>``,
3. a YAML or JSON file, named by the caller or by ``FLEXKV_CONFIG_PATH``,
4. the defaults below.

This is the only module of the packages that reads the environment. Whatever is wrong in any of the places becomes one
:class:`~flexkv_core.errors.ConfigError` that names each key, its value, where that came from, and what is allowed.
``flexkv config --markdown`` prints the table of all keys that README.md carries.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import ByteSize, Field, ValidationError, ValidationInfo, field_validator
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from flexkv_core.errors import ConfigError

ENV_PREFIX = "FLEXKV_"
PATH_VARIABLE = "FLEXKV_CONFIG_PATH"
# Variables with our prefix that are no keys: read by this module or by scripts/.
CACHE_DIR_VARIABLE = "FLEXKV_CACHE_DIR"
RESERVED_VARIABLES = frozenset({PATH_VARIABLE, CACHE_DIR_VARIABLE})

_HOST_SHARE = 4  # a quarter of the memory, so that the engine's weights and its own cache have room
_HOST_BYTES_MAX = 8 << 30  # what one engine gets unasked; touching and pinning more takes seconds at start
# Versions 2 and 1.
_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")

_SIZE = 'size: bytes, or text such as "4GiB" or "512MB"'
_SWITCH = "true or false"
_TEXT = "text"


def default_host_bytes() -> int:
    """A quarter of the memory of this machine or container, at most 8 GiB.

    Taken from the total, not from what is free at the moment, so that every process of one engine computes the same value.
    """
    total_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for file in map(Path, _CGROUP_LIMITS):
        limit = file.read_text().strip() if file.exists() else "max"
        if limit.isdigit():
            total_bytes = min(total_bytes, int(limit))
    return min(total_bytes // _HOST_SHARE, _HOST_BYTES_MAX)


def _allowed(text: str) -> dict[str, Any]:
    """Metadata of a field: the words for its type in error messages and in the generated table."""
    return {"allowed": text}


class FlexKVConfig(BaseSettings):
    """All settings of one FlexKV instance. Immutable; picklable; equal in every process of one engine.

    Built directly (``FlexKVConfig(host_bytes="1GiB")``) it reads nothing but its arguments; :func:`load_config` reads all places.
    """

    model_config = SettingsConfigDict(
        frozen=True, extra="forbid", env_prefix=ENV_PREFIX, validate_default=True, protected_namespaces=()
    )

    host_bytes: Annotated[ByteSize, Field(gt=0)] = Field(
        default_factory=lambda: ByteSize(default_host_bytes()),
        description="Size of the host tier: one shared-memory segment, taken at start.",
        json_schema_extra=_allowed(_SIZE) | {"default": "a quarter of the memory, at most 8 GiB"},
    )
    tokens_per_block: int | None = Field(
        default=None,
        ge=1,
        description="Tokens in one cached block; a multiple of the engine's block size.",
        json_schema_extra=_allowed("integer ≥ 1") | {"default": "the engine's block size"},
    )
    eviction: str = Field(
        default="lru",
        description="Which blocks leave a full tier first: the name of a policy.",
        json_schema_extra=_allowed("name of a policy"),
    )
    huge_pages: bool = Field(
        default=False,
        description="Back the host tier with 2 MiB huge pages; the start fails when the machine has too few.",
        json_schema_extra=_allowed(_SWITCH),
    )
    ssd_dirs: list[str] = Field(
        default=[],
        description="Directories of the SSD tier, on different disks to use them together; none: no SSD tier.",
        json_schema_extra=_allowed("list of absolute paths"),
    )
    ssd_bytes: Annotated[ByteSize, Field(gt=0)] = Field(
        default=ByteSize(16 << 30),
        description="What the SSD tier takes in each directory, its catalogue included; allocated at start.",
        json_schema_extra=_allowed(_SIZE) | {"default": "16 GiB"},
    )
    io_engine: Literal["auto", "uring", "threads"] = Field(
        default="auto",
        description="How the SSD is read and written; `auto` takes io_uring where the system allows it.",
        json_schema_extra=_allowed("auto, uring or threads"),
    )
    io_queue_depth: int = Field(
        default=64,
        ge=1,
        le=4096,
        description="Operations that the SSD is given at a time.",
        json_schema_extra=_allowed("integer from 1 to 4096"),
    )
    write_queue_bytes: Annotated[ByteSize, Field(gt=0)] = Field(
        default=ByteSize(2 << 30),
        description="How much may wait to be written to the SSD; beyond it the oldest is not written.",
        json_schema_extra=_allowed(_SIZE) | {"default": "2 GiB"},
    )
    scrub_bytes_per_s: Annotated[ByteSize, Field(ge=0)] = Field(
        default=ByteSize(16 << 20),
        description="Bandwidth at which the SSD is read through in the background to find damage; 0: never.",
        json_schema_extra=_allowed(_SIZE) | {"default": "16 MiB"},
    )
    store_dtype: Literal["engine", "fp8"] = Field(
        default="engine",
        description="What all tiers hold: the engine's own bytes, or bfloat16 KV rounded to 8-bit floats, half the size. fp8 is lossy: "
        "answers may differ from those without a cache.",
        json_schema_extra=_allowed("engine or fp8"),
    )
    verify_checksums: bool = Field(
        default=True,
        description="Check each block's CRC32C before it goes back to the engine; a mismatch is a miss.",
        json_schema_extra=_allowed(_SWITCH),
    )
    verify_sample: float = Field(
        default=0.0,
        ge=0,
        le=1,
        allow_inf_nan=False,
        description="Share of the hits that is computed again and compared with what was stored; 0: none.",
        json_schema_extra=_allowed("number from 0 to 1"),
    )
    remote_url: str | None = Field(
        default=None,
        description="Store that several machines share, such as `dir:/mnt/kv`, `s3://bucket/path`, `valkey://host:6379` or "
        "`mooncake://master:50051`; none: no remote tier.",
        json_schema_extra=_allowed("URL without credentials"),
    )
    remote_options: dict[str, str] = Field(
        default={},
        description="Options of the store's client, such as `endpoint`, `region`, `cluster` or `protocol`; no credentials.",
        json_schema_extra=_allowed("mapping of text to text"),
    )
    remote_username: str | None = Field(
        default=None,
        description="User name for a store that asks for one.",
        json_schema_extra=_allowed(_TEXT),
    )
    remote_password_file: str | None = Field(
        default=None,
        description="File that holds the password for a store that asks for one; read at each connection.",
        json_schema_extra=_allowed("absolute path"),
    )
    remote_lookup_deadline_ms: float = Field(
        default=100.0,
        gt=0,
        allow_inf_nan=False,
        description="A request waits at most this long to learn what the store has; a later answer serves the next one.",
        json_schema_extra=_allowed("number > 0"),
    )
    remote_read_deadline_ms: float = Field(
        default=2000.0,
        gt=0,
        allow_inf_nan=False,
        description="A request waits at most this long for blocks of the store; what has arrived by then is a hit.",
        json_schema_extra=_allowed("number > 0"),
    )
    remote_wait_ms: float = Field(
        default=0.0,
        ge=0,
        le=10_000,
        allow_inf_nan=False,
        description="A request whose prompt is not all in the store waits this long for the rest, which another engine may be writing.",
        json_schema_extra=_allowed("number ≥ 0, at most 10000"),
    )
    remote_timeout_s: float = Field(
        default=5.0,
        gt=0,
        le=60,
        allow_inf_nan=False,
        description="Bound of one call of the store's client; a client that hangs three times as long is ended.",
        json_schema_extra=_allowed("number > 0, at most 60"),
    )
    remote_read_tokens_min: int = Field(
        default=256,
        ge=1,
        description="Fewer tokens than this are recomputed, not fetched from the store.",
        json_schema_extra=_allowed("integer ≥ 1"),
    )
    remote_write: Literal["stored", "used_again", "never"] = Field(
        default="stored",
        description="What is written to the store: blocks when they are stored, blocks that are used a second time, or nothing.",
        json_schema_extra=_allowed("stored, used_again or never"),
    )
    remote_write_tokens_min: int = Field(
        default=0,
        ge=0,
        description="Sequences of fewer tokens are not written to the store.",
        json_schema_extra=_allowed("integer ≥ 0"),
    )
    remote_write_bytes_per_s: Annotated[ByteSize, Field(ge=0)] = Field(
        default=ByteSize(0),
        description="Bound of the bandwidth to the store; 0: none.",
        json_schema_extra=_allowed(_SIZE),
    )
    remote_read_bytes_per_s: Annotated[ByteSize, Field(ge=0)] = Field(
        default=ByteSize(0),
        description="Bound of the bandwidth from the store; 0: none.",
        json_schema_extra=_allowed(_SIZE),
    )
    remote_queue_bytes: Annotated[ByteSize, Field(gt=0)] = Field(
        default=ByteSize(1 << 30),
        description="How much may wait to be written to the store; beyond it the oldest is not written.",
        json_schema_extra=_allowed(_SIZE) | {"default": "1 GiB"},
    )
    remote_known_s: float = Field(
        default=30.0,
        ge=0,
        allow_inf_nan=False,
        description="Seconds for which the store is believed to have what it was found to have.",
        json_schema_extra=_allowed("number ≥ 0"),
    )
    namespace: str = Field(
        default="",
        description="Kept in front of every key: deployments with different namespaces share no block.",
        json_schema_extra=_allowed(_TEXT),
    )
    model_id: str | None = Field(
        default=None,
        min_length=1,
        description="Name of the model in the fingerprint of all keys.",
        json_schema_extra=_allowed(_TEXT) | {"default": "the engine's model"},
    )
    model_revision: str | None = Field(
        default=None,
        min_length=1,
        description="Revision of the model in the fingerprint of all keys.",
        json_schema_extra=_allowed(_TEXT) | {"default": "the engine's revision"},
    )
    load_tokens_min: int = Field(
        default=0,
        ge=0,
        description="A hit of fewer tokens than this is recomputed, not loaded.",
        json_schema_extra=_allowed("integer ≥ 0"),
    )
    layerwise_bytes_max: Annotated[ByteSize, Field(ge=0)] = Field(
        default=ByteSize(0),
        description="A hit in host memory of at most this size that comes alone is loaded layer by layer while the engine computes.",
        json_schema_extra=_allowed(_SIZE),
    )
    layerwise_store_bytes_min: Annotated[ByteSize, Field(ge=0)] = Field(
        default=ByteSize(0),
        description="A store of at least this size is copied layer by layer while the engine computes the next ones; 0: none is.",
        json_schema_extra=_allowed(_SIZE),
    )
    prefetch_queued: bool = Field(
        default=False,
        description="Read from the SSD into host memory for requests that wait in the engine's queue.",
        json_schema_extra=_allowed(_SWITCH),
    )
    store_decode: bool = Field(
        default=True,
        description="Store blocks that hold generated tokens too, not only those of prompts.",
        json_schema_extra=_allowed(_SWITCH),
    )
    transfer_timeout_s: float = Field(
        default=20.0,
        gt=0,
        allow_inf_nan=False,
        description="Seconds after which a transfer is given up and counts as a miss.",
        json_schema_extra=_allowed("number > 0"),
    )
    queue_ops_max: int = Field(
        default=1024,
        ge=1,
        description="Bound of each transfer queue; a store that finds it full is dropped, a load becomes a miss.",
        json_schema_extra=_allowed("integer ≥ 1"),
    )
    events: bool = Field(
        default=True,
        description="Report stored and removed blocks to the engine when it publishes KV events.",
        json_schema_extra=_allowed(_SWITCH),
    )

    @field_validator("verify_sample")
    @classmethod
    def _comparable(cls, share: float, info: ValidationInfo) -> float:
        if share and info.data.get("store_dtype") == "fp8":
            raise ValueError(
                "with store_dtype = fp8 stored bytes cannot be compared; set one of the two back"
            )
        return share

    @field_validator("remote_url")
    @classmethod
    def _known_store(cls, url: str | None) -> str | None:
        if url is None:
            return None
        scheme, separator, rest = url.partition(":")
        if not separator or not scheme:
            raise ValueError("a scheme and a colon are needed")
        if "@" in rest.partition("?")[0]:
            raise ValueError(
                "credentials do not belong into the URL; see remote_username and remote_password_file"
            )
        return url

    @field_validator("remote_password_file")
    @classmethod
    def _absolute_file(cls, file: str | None) -> str | None:
        if file is not None and not Path(file).is_absolute():
            raise ValueError("not an absolute path")
        return file

    server: str | None = Field(
        default=None,
        min_length=1,
        description="Socket of a `flexkv serve` whose tiers are used instead of own ones; without an answer everything is computed.",
        json_schema_extra=_allowed("absolute path") | {"default": "none: tiers of its own"},
    )

    server_deadline_ms: float = Field(
        default=5.0,
        gt=0,
        le=1000,
        allow_inf_nan=False,
        description="How long a lookup waits for the server; what is not back by then is a miss.",
        json_schema_extra=_allowed("number > 0, at most 1000"),
    )

    @field_validator("server")
    @classmethod
    def _absolute_socket(cls, path: str | None) -> str | None:
        if path is not None and not Path(path).is_absolute():
            raise ValueError(f"{path!r} is not an absolute path")
        return path

    @field_validator("ssd_dirs")
    @classmethod
    def _absolute(cls, directories: list[str]) -> list[str]:
        for directory in directories:
            if not Path(directory).is_absolute():
                raise ValueError(f"{directory!r} is not an absolute path")
        if len({os.path.realpath(directory) for directory in directories}) < len(directories):
            raise ValueError("a directory is named twice")
        return directories

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """The arguments only: :func:`load_config` merges the other places itself, so that it can name them in errors."""
        return (init_settings,)

    @field_validator("eviction")
    @classmethod
    def _known_policy(cls, name: str) -> str:
        # Imported here: the registry's package imports modules that may come to need this one.
        from flexkv_core.cache.eviction import POLICIES

        if name not in POLICIES:
            raise ValueError(f"no such policy; known: {', '.join(sorted(POLICIES))}")
        return name


@dataclass(frozen=True)
class Setting:
    """One effective value: what ``flexkv config`` shows. ``origin`` is in words, such as ``environment FLEXKV_HOST_BYTES``."""

    key: str
    value: object
    origin: str


@dataclass(frozen=True)
class _Raw:
    """A value as it was found, before validation, and where."""

    value: object
    origin: str


def load_config(
    overrides: Mapping[str, object] | None = None,
    path: str | os.PathLike[str] | None = None,
    ignore: Collection[str] = (),
) -> FlexKVConfig:
    """Merge the four places and validate the result.

    ``overrides``: keys given by the caller, who wins over the environment. ``path``: the file to read instead of the one that
    ``FLEXKV_CONFIG_PATH`` names. ``ignore``: keys of ``overrides`` that belong to someone else (vLLM puts keys of its own into the
    same mapping). Raises :class:`ConfigError` with every problem that was found.
    """
    return _validate(_collect(overrides, path, ignore))


def effective_settings(path: str | os.PathLike[str] | None = None) -> list[Setting]:
    """What :func:`load_config` would give here, key by key with its origin. Raises :class:`ConfigError` likewise."""
    found = _collect(None, path, ())
    config = _validate(found)
    return [
        Setting(key, getattr(config, key), found[key].origin if key in found else "default")
        for key in FlexKVConfig.model_fields
    ]


def as_environment(settings: Mapping[str, object]) -> dict[str, str]:
    """``settings``, by key, as the variables that give them to another process."""
    return {
        f"{ENV_PREFIX}{key.upper()}": value if isinstance(value, str) else json.dumps(value)
        for key, value in settings.items()
    }


def cache_dir() -> Path:
    """Where the scripts and the benchmarks keep environments and models: ``FLEXKV_CACHE_DIR``, else a folder of the user's cache."""
    given = os.environ.get(CACHE_DIR_VARIABLE)
    if given:
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "flexkv"


def child_environment(defaults: Mapping[str, str]) -> dict[str, str]:
    """This process's environment for one that it starts, with ``defaults`` for what the user did not set."""
    return {**defaults, **os.environ}


def default_socket() -> Path:
    """Where ``flexkv serve`` listens unless it is told: in a folder of the user's own, which the system or the server makes with mode 0700."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    folder = Path(runtime) / "flexkv" if runtime else Path(f"/tmp/flexkv-{os.getuid()}")
    return folder / "serve.sock"


def markdown_table() -> str:
    """The table of all keys that README.md carries between its markers, without a newline at the end."""
    lines = ["| key | type | default | environment | meaning |", "|---|---|---|---|---|"]
    for key, field in FlexKVConfig.model_fields.items():
        lines.append(
            f"| `{key}` | {_extra(key)['allowed']} | {_default_words(key)} | `{ENV_PREFIX}{key.upper()}` "
            f"| {field.description} |"
        )
    return "\n".join(lines)


def _collect(
    overrides: Mapping[str, object] | None, path: str | os.PathLike[str] | None, ignore: Collection[str]
) -> dict[str, _Raw]:
    """All values that were found, the highest place winning; unknown keys stay in and fail in :func:`_validate`."""
    found = _from_file(path)
    found.update(_from_environment())
    for key, value in (overrides or {}).items():
        if key not in ignore:
            found[key] = _Raw(value, "the caller's configuration")
    return found


def _from_file(path: str | os.PathLike[str] | None) -> dict[str, _Raw]:
    """Keys of the YAML or JSON file; nothing when none is named."""
    named_by = "given by the caller"
    if path is None:
        path = os.environ.get(PATH_VARIABLE)
        named_by = f"named by {PATH_VARIABLE}"
    if not path:
        return {}
    file = Path(path)
    if file.suffix not in (".yaml", ".yml", ".json"):
        raise ConfigError(
            f"configuration file {file} ({named_by}): the name must end in .yaml, .yml or .json"
        )
    try:
        text = file.read_text(encoding="utf-8")
        content = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"configuration file {file} ({named_by}) cannot be read: {error}") from error
    if content is None:  # an empty YAML file
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"configuration file {file} ({named_by}): a mapping of keys to values is needed")
    return {str(key): _Raw(value, f"file {file}") for key, value in content.items()}


def _from_environment() -> dict[str, _Raw]:
    """Values of ``FLEXKV_*``; a variable that is no key stays in under its own name and fails in :func:`_validate`."""
    try:
        values = EnvSettingsSource(FlexKVConfig, case_sensitive=False)()
    except SettingsError as error:  # a list or mapping that is no JSON
        raise ConfigError(f"environment: {error}; {error.__cause__}") from error
    found = {key: _Raw(value, f"environment {ENV_PREFIX}{key.upper()}") for key, value in values.items()}
    for name in os.environ:
        if name.upper().startswith(ENV_PREFIX) and name not in RESERVED_VARIABLES:
            key = name[len(ENV_PREFIX) :].lower()
            if key not in FlexKVConfig.model_fields:
                found[name] = _Raw(os.environ[name], "environment")
    return found


def _validate(found: Mapping[str, _Raw]) -> FlexKVConfig:
    try:
        return FlexKVConfig.model_validate({key: raw.value for key, raw in found.items()})
    except ValidationError as error:
        problems = [
            _problem(str(item["loc"][0]), item["type"], item["msg"], found) for item in error.errors()
        ]
    raise ConfigError("FlexKV's configuration is wrong:\n" + "\n".join(f"  {line}" for line in problems))


def _problem(key: str, kind: str, message: str, found: Mapping[str, _Raw]) -> str:
    """One line about one key: its value, where that came from, and what is allowed."""
    raw = found.get(key, _Raw("default", "default"))
    head = f"{key} = {_shown(key, raw.value)} (from {raw.origin}): "
    if kind == "extra_forbidden":
        return head + f"no such key{_did_you_mean(key)}"
    return head + f"{message.removeprefix('Value error, ')}; allowed: {_extra(key)['allowed']}"


def _shown(key: str, value: object) -> str:
    """A value in a message; what may hold a password by mistake is not repeated."""
    return re.sub(r"(?<=:)[^@]*(?=@)", "***", repr(value)) if key == "remote_url" else repr(value)


def _did_you_mean(key: str) -> str:
    """A hint with the nearest key, spelled as a variable where a variable was given."""
    is_variable = key.upper().startswith(ENV_PREFIX)
    known = [f"{ENV_PREFIX}{k.upper()}" if is_variable else k for k in FlexKVConfig.model_fields]
    if is_variable:
        known += sorted(RESERVED_VARIABLES)
    near = difflib.get_close_matches(key.upper() if is_variable else key.lower(), known, n=1)
    return f"; did you mean {near[0]}?" if near else f"; known are {', '.join(known)}"


def _extra(key: str) -> dict[str, Any]:
    extra = FlexKVConfig.model_fields[key].json_schema_extra
    assert isinstance(extra, dict), f"{key} has no description of its type"
    return extra


def _default_words(key: str) -> str:
    """The default as a person would write it in a file."""
    words = _extra(key).get("default")
    if words is not None:
        return str(words)
    return f"`{json.dumps(FlexKVConfig.model_fields[key].default)}`"
