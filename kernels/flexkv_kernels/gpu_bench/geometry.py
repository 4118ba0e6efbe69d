"""Layouts as engines make them, from a few numbers, with fresh random bytes: what the kernels are compared on."""

from __future__ import annotations

from dataclasses import dataclass

import torch

DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8": torch.float8_e4m3fn,
    "uint8": torch.uint8,
}

LAYOUTS = (
    "kv_outer",  # [2, blocks, tokens, heads, dim]: K and V in one tensor, K first
    "kv_inner",  # [blocks, 2, tokens, heads, dim]
    "pools",  # K and V in tensors of their own
    "mla",  # [blocks, tokens, dim]: one latent
    "packed",  # [blocks, layers, tokens, heads, dim]: all layers of a block together
    "heads_first",  # [blocks, heads, tokens, dim] seen as [blocks, tokens, heads, dim]
    "heads_outside",  # [heads, blocks, tokens, dim] seen as [blocks, tokens, heads, dim]: a piece a head
)


@dataclass(frozen=True)
class Geometry:
    """One engine's KV cache."""

    layout: str
    dtype: str
    blocks: int
    tokens: int  # of a block
    layers: int = 2
    heads: int = 2
    dim: int = 8

    @property
    def block_dim(self) -> int:
        """Which dimension of each tensor counts the blocks."""
        return 1 if self.layout == "kv_outer" else 0

    def tensors(self, seed: int, device: str = "cpu") -> list[torch.Tensor]:
        """The engine's tensors, random bytes (for a float also NaN and what else bytes can mean)."""
        generator = torch.Generator(device).manual_seed(seed)

        def fresh(*shape: int) -> torch.Tensor:
            dtype = DTYPES[self.dtype]
            shape = (*shape[:-1], shape[-1] * dtype.itemsize)
            raw = torch.randint(0, 256, shape, dtype=torch.uint8, device=device, generator=generator)
            return raw.view(dtype)

        inner = (self.tokens, self.heads, self.dim)
        if self.layout == "packed":
            whole = fresh(self.blocks, self.layers, *inner)
            return [whole[:, layer] for layer in range(self.layers)]
        return [tensor for _ in range(self.layers) for tensor in self._layer(fresh, inner)]

    def _layer(self, fresh, inner: tuple[int, int, int]) -> list[torch.Tensor]:  # type: ignore[no-untyped-def]
        tokens, heads, dim = inner
        if self.layout == "kv_outer":
            return [fresh(2, self.blocks, *inner)]
        if self.layout == "kv_inner":
            return [fresh(self.blocks, 2, *inner)]
        if self.layout == "pools":
            return [fresh(self.blocks, *inner), fresh(self.blocks, *inner)]
        if self.layout == "mla":
            return [fresh(self.blocks, tokens, dim)]
        if self.layout == "heads_first":
            return [fresh(self.blocks, heads, tokens, dim).transpose(1, 2)]
        assert self.layout == "heads_outside", self.layout
        return [fresh(heads, self.blocks, tokens, dim).permute(1, 2, 0, 3)]
