"""Stands in for SGLang's CUDA kernels: any name of any submodule can be imported, and says which it is when it is called."""

import importlib.abc
import importlib.machinery
import sys
import types

__version__ = "0.0.0"
__path__: list = []


class _Absent:
    """A kernel that is not there."""

    def __init__(self, name):
        self.__name__ = self.__qualname__ = name

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return _Absent(f"{self.__name__}.{name}")

    def __call__(self, *arguments, **options):
        raise NotImplementedError(f"{self.__name__} is a CUDA kernel; there is none on a CPU")


class _Submodule(types.ModuleType):
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return _Absent(f"{self.__name__}.{name}")


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, fullname, path=None, target=None):
        if not fullname.startswith("sgl_kernel."):
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec):
        module = _Submodule(spec.name)
        module.__path__ = []
        return module

    def exec_module(self, module):
        """Nothing to run."""


sys.meta_path.insert(0, _Finder())


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return _Absent(f"sgl_kernel.{name}")
