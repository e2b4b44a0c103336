"""backend="emulated": the CUDA kernels of csrc/ as C++ on an emulated GPU, on tensors in ordinary memory.

The native module is built once more, with EPO_CUDA=emulated, into build/emulated; tests/native/emulator says what a
launch is checked for. A fault is a RuntimeError that says what is wrong and where.
"""

from __future__ import annotations

import ctypes
import fcntl
import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.machinery import ExtensionFileLoader
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from epo_kernels import backends, ops
from epo_kernels.backends import cuda, native
from epo_kernels.backends.fused import FusedBackend

ROOT = Path(__file__).resolve().parents[2]
CMAKE = shutil.which("cmake") or shutil.which("cmake", path=Path(sys.executable).parent)
NEEDS_COMPILER = pytest.mark.skipif(
    CMAKE is None or shutil.which("g++") is None, reason="needs cmake and g++ to build the emulator"
)
ITEM_SIZES = {"float64": 8, "int64": 8, "float32": 4, "int32": 4, "float16": 2, "bfloat16": 2, "bool": 1}
H200_SHARED_BYTES = 232_448  # of a block: 13 tiles a warp


def build(folder: Path = ROOT / "build" / "emulated", source: Path = ROOT) -> Path:
    """Builds the module, what has changed of it; returns its path. Tests may do so side by side."""
    import pybind11

    folder.mkdir(parents=True, exist_ok=True)
    options = {"EPO_CUDA": "emulated", "Python_EXECUTABLE": sys.executable, "pybind11_DIR": pybind11.get_cmake_dir()}
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in (
            (CMAKE, "-S", source, "-B", folder, *(f"-D{name}={value}" for name, value in options.items())),
            (CMAKE, "--build", folder, "--target", "_native", "--parallel", "2"),
        ):
            done = subprocess.run(command, capture_output=True, text=True, timeout=600)
            assert done.returncode == 0, done.stdout + done.stderr
    (module,) = folder.glob("_native*.so")
    return module


class Emulator:
    """The module, and what its GPU is like.

    Attributes:
        module: stands in for epo_kernels._native. Arrays that it makes are what the next launch may touch; those that a
            call fills are taken as uninitialised.
    """

    def __init__(self, path: Path) -> None:
        loader = ExtensionFileLoader("_native", str(path))
        spec = importlib.util.spec_from_loader("_native", loader)
        assert spec is not None
        self._native: ModuleType = importlib.util.module_from_spec(spec)
        loader.exec_module(self._native)
        self._library = ctypes.CDLL(str(path))
        self.module = SimpleNamespace(**{name: getattr(self._native, name) for name in dir(self._native)})
        self.module.Array = self._array
        self.configure()

    def configure(
        self, seed: int = 0, processors: int = 4, shared_bytes: int = H200_SHARED_BYTES, capability: int = 9
    ) -> None:
        """The GPU of the next launches, and the seed of their schedules; counts launches from 0."""
        self._library.emulator_configure(ctypes.c_uint64(seed), processors, shared_bytes, capability)

    def launches(self, cluster: int = 0) -> int:
        """How many so far; of the ring, in clusters of that many blocks."""
        return self._library.emulator_launches(cluster)

    def _array(self, pointer, dtype, sizes, strides, begin, capacity, owner):
        made = self._native.Array(pointer, dtype, sizes, strides, begin, capacity, owner)
        numbers = [(ctypes.c_int64 * len(sizes))(*values) for values in (sizes, strides)]
        self._library.emulator_allow(
            ctypes.c_uint64(pointer), ctypes.c_int64(ITEM_SIZES[dtype]), len(sizes), *numbers, 1
        )
        return made


@cache
def emulator() -> Emulator:
    return Emulator(build())


@contextmanager
def installed(gpu: Emulator, family: str = "chosen") -> Iterator[Emulator]:
    """backend="emulated" is there, and computes with that family of kernels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "_native", gpu.module)
        patch.setattr(cuda, "_place", lambda tensor: (0, 0))
        patch.setitem(ops.KERNELS, "emulated", None)  # FusedBackend puts its own there
        backend = FusedBackend("emulated", ("cpu",), lambda: cuda.CudaRows(family), lambda: None)
        patch.setitem(backends._BACKENDS, "emulated", backend)
        yield gpu
