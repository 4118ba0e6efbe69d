"""The checksum that a kernel can take on the way, and its twin for the host.

``sum over i of word[i] * (2 i + 1) modulo 2**64`` over the image's little-endian 32-bit words. A CRC needs the bytes in order, or
a matrix product a word to combine parts; a sum may be taken tile by tile in any order, which is what programs on a GPU do, and costs
one multiplication a word. Odd weights are invertible, so that any change of one word changes the sum; the weights of two words differ
by less than 2**32, so that exchanging two unequal words does. It is weaker than the CRC32C that guards slots and catalogue and does
not replace it: it finds faults between device and host memory.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def weighted_sums(images: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    """The checksum of each row of ``images``, uint8 [n, bytes], bytes a multiple of 4; as int64, as the kernel stores it."""
    words = np.ascontiguousarray(images).view("<u4").astype(np.uint64)
    weights = np.arange(words.shape[1], dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    return (words * weights).sum(axis=1, dtype=np.uint64).view(np.int64)
