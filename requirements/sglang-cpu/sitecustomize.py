"""Lets ``import torchvision`` work beside a CPU build of torch: its module of fake kernels asks for operators that are not there."""

import sys
import types

sys.modules["torchvision._meta_registrations"] = types.ModuleType("torchvision._meta_registrations")
