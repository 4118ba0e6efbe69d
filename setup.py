"""Build of the optional C extension, and of the patches for engines into the wheel; everything else is in pyproject.toml."""

import glob
import shutil
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_py import build_py


class BuildWithPatches(build_py):
    """Copies ``patches/`` beside the command that applies them; a checkout and an editable install use the folder itself."""

    def run(self):
        """See the class."""
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib, "flexkv_core", "cli", "patch", "patches")
            shutil.copytree("patches", target, dirs_exist_ok=True)


setup(
    cmdclass={"build_py": BuildWithPatches},
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
    ],
)
