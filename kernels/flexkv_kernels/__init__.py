"""Kernels and device copiers: what moves KV blocks between a device and host slots."""

from flexkv_kernels.choice import copier_for, copier_over
from flexkv_kernels.copier import CpuCopier
from flexkv_kernels.segments import pieces_of

__all__ = ["CpuCopier", "copier_for", "copier_over", "pieces_of"]
