"""Kernels compiled ahead of time for targets that are not there, and what their machine code says."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime.jit import JITFunction

from flexkv_kernels.access import THREADS, Access
from flexkv_kernels.paged_copy import paged_copy_kernel
from flexkv_kernels.quantised_copy import dequantise_kernel, quantise_kernel, registers_max

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

_SIGNATURE = {
    "segment_addresses": "*i64",
    "segment_strides": "*i64",
    "blocks": "*i64",
    "images": "*i64",
    "checksums": "*i64",
    "block_count": "i32",
    "segment_start": "i32",
    "segment_count": "i32",
    "piece_bytes": "i32",
}


_ROUNDING_SIGNATURE = {
    "segment_addresses": "*i64",
    "segment_strides": "*i64",
    "blocks": "*i64",
    "images": "*i64",
    "block_count": "i32",
    "segment_start": "i32",
    "segment_count": "i32",
    "scale_count": "i32",
    "piece_values": "i32",
    "scales_offset": "i32",
}


@dataclass(frozen=True)
class Resources:
    """Registers a thread, and bytes of local memory: what was spilled."""

    registers: int
    spilled: int


@cache
def compiled(target: str, access: Access, to_images: bool) -> CompiledKernel:
    """The variant's code for ``target``; ``asm`` holds every stage."""
    # From the undecorated function: the decorator gives an interpreted one where the interpreter is on.
    constants = {
        "TO_IMAGES": to_images,
        "VECTOR_BYTES": access.vector_bytes,
        "TILE_BYTES": access.tile_bytes,
        "CHECKSUM": access.checksum,
    }
    source = ASTSource(
        JITFunction(paged_copy_kernel.fn),
        _SIGNATURE | dict.fromkeys(constants, "constexpr"),
        constexprs=constants,
    )
    warps = THREADS // TARGETS[target].warp_size
    return triton.compile(source, target=TARGETS[target], options={"num_warps": warps})


@cache
def compiled_rounding(target: str, variant: tuple[int, int], to_images: bool) -> CompiledKernel:
    """The same of the kernels that round to fp8; ``variant``: values an access, and a tile."""
    kernel = quantise_kernel if to_images else dequantise_kernel
    constants = dict(zip(("VECTOR", "TILE"), variant, strict=True))
    arguments = [name for name in kernel.arg_names if name not in constants]
    source = ASTSource(
        JITFunction(kernel.fn),
        {name: _ROUNDING_SIGNATURE[name] for name in arguments} | dict.fromkeys(constants, "constexpr"),
        constexprs=constants,
    )
    options = {"num_warps": THREADS // TARGETS[target].warp_size}
    if to_images and target != "gfx942":  # AMD's compiler has no such option, and no GPU of AMD is served
        options["maxnreg"] = registers_max(variant)
    return triton.compile(source, target=TARGETS[target], options=options)


def resources(target: str, kernel: CompiledKernel) -> Resources:
    """Read from the binary (NVIDIA) or the assembler's notes (AMD)."""
    if target == "gfx942":
        text = kernel.asm["amdgcn"]
        spills = [int(n) for n in re.findall(r"\.[sv]gpr_spill_count:\s*(\d+)", text)]
        return Resources(_number(r"\.vgpr_count:\s*(\d+)", text), sum(spills))
    text = _cuobjdump("--dump-resource-usage", kernel)
    return Resources(
        _number(r"REG:(\d+)", text), _number(r"LOCAL:(\d+)", text) + _number(r"STACK:(\d+)", text)
    )


def machine_code(target: str, kernel: CompiledKernel) -> str:
    """SASS, or AMD's assembler."""
    return kernel.asm["amdgcn"] if target == "gfx942" else _cuobjdump("--dump-sass", kernel)


def _cuobjdump(option: str, kernel: CompiledKernel) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        return subprocess.run([tool, option, file.name], check=True, capture_output=True, text=True).stdout


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found, f"no {pattern} in:\n{text[:2000]}"
    return int(found[1])
