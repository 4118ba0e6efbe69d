"""Kernels and device copiers: what moves KV blocks between a device and host slots."""

from flexkv_kernels.copier import CpuCopier, segments_of

__all__ = ["CpuCopier", "segments_of"]
