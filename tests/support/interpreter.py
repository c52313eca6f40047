"""Triton's interpreter, in which the kernels of the integer engine run on the CPU (`tests/conftest.py` turns it on).

A test file that imports this module is skipped where there is no Triton.
"""

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("no Triton, which is made for Linux", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("TRITON_INTERPRET is not 1: kernels need a GPU", allow_module_level=True)

from triton.runtime.interpreter import interpreter_builder

from qdiff.engines.gpu import launches, layers, traffic

__all__ = ["counting", "launches", "layers", "traffic"]


class Counter:
    """Counts the loads and stores of all programs, in bytes."""

    def __init__(self) -> None:
        self.launches, self.loads, self.stores = 0, 0, 0
        self.loaded: list[np.ndarray] = []  # addresses of bytes that are loaded
        self.stored: list[np.ndarray] = []

    def add(self, pointers: Any, mask: Any, stores: bool) -> None:
        size = pointers.get_element_ty().primitive_bitwidth // 8
        addresses = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)]
        moved = np.unique(addresses.astype(np.int64)) * 16 + size  # sizes are below 16: one number for both
        if stores:
            self.stores += addresses.size * size
            self.stored.append(moved)
        else:
            self.loads += addresses.size * size
            self.loaded.append(moved)

    def traffic(self) -> traffic.Traffic:
        """What has been counted."""
        distinct = sum(int((np.unique(np.concatenate(moved)) % 16).sum()) for moved in (self.loaded, self.stored))
        return traffic.Traffic(self.launches, self.loads, self.stores, distinct)


@contextmanager
def counting() -> Iterator[Counter]:
    """Count the loads and stores of kernels that run inside."""
    counter, builder = Counter(), interpreter_builder
    load, store, start = builder.create_masked_load, builder.create_masked_store, builder.set_grid_dim

    def counted_load(pointers: Any, mask: Any, *args: Any, **named: Any) -> Any:
        counter.add(pointers, mask, stores=False)
        return load(pointers, mask, *args, **named)

    def counted_store(pointers: Any, value: Any, mask: Any, *args: Any, **named: Any) -> Any:
        counter.add(pointers, mask, stores=True)
        return store(pointers, value, mask, *args, **named)

    def counted_start(*grid: int) -> None:
        counter.launches += 1
        start(*grid)

    builder.create_masked_load, builder.create_masked_store = counted_load, counted_store
    builder.set_grid_dim = counted_start
    try:
        yield counter
    finally:
        del builder.create_masked_load, builder.create_masked_store, builder.set_grid_dim
