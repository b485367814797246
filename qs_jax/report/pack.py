"""Arrays as text in a page: little-endian numbers, deflated, in base 64."""

from __future__ import annotations

import base64
import hashlib
import zlib
from typing import Any

import numpy as np

_KINDS = {"uint8": "u1", "uint16": "u2", "int32": "i4", "float16": "f2", "float32": "f4"}


class Pool:
    """Arrays of a report; equal ones are stored once.

    Attributes:
      arrays: What goes into the page: {"kind", "shape", "data"}.
    """

    def __init__(self) -> None:
        self.arrays: list[dict[str, Any]] = []
        self._places: dict[str, int] = {}

    def add(self, array: np.ndarray) -> int:
        """Store an array of one of the known dtypes; returns its place in `arrays`."""
        kind = _KINDS[array.dtype.name]
        raw = np.ascontiguousarray(array, dtype="<" + kind).tobytes()
        key = hashlib.sha256(f"{kind}{array.shape}".encode() + raw).hexdigest()
        if key not in self._places:
            # Bytes of one significance next to each other compress better.
            planes = np.frombuffer(raw, np.uint8).reshape(-1, array.dtype.itemsize).T.tobytes()
            data = base64.b64encode(zlib.compress(planes, 6)).decode("ascii")
            self._places[key] = len(self.arrays)
            self.arrays.append({"kind": kind, "shape": list(array.shape), "data": data})
        return self._places[key]


def unpack(stored: dict[str, Any]) -> np.ndarray:
    """The array of an entry of `Pool.arrays`."""
    planes = np.frombuffer(zlib.decompress(base64.b64decode(stored["data"])), np.uint8)
    dtype = np.dtype("<" + stored["kind"])
    return planes.reshape(dtype.itemsize, -1).T.copy().view(dtype).reshape(stored["shape"])
