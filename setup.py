"""Build of the optional C extension; everything else is in pyproject.toml."""

import glob

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "flexkv_core.native._native",
            sources=sorted(glob.glob("flexkv_core/native/*.c")),
            depends=sorted(glob.glob("flexkv_core/native/*.h")),
            include_dirs=["flexkv_core/native/third_party/xxhash"],
            extra_compile_args=["-O3", "-std=c11", "-fvisibility=hidden", "-Wall", "-Wextra", "-pthread"],
            extra_link_args=["-pthread"],
            optional=True,
        )
    ]
)
