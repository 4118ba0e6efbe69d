"""``scripts/gpu_bench``: on a machine with an NVIDIA GPU, checks all kernels against the reference and measures every way of copying."""
