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
from functools import cache, partial
from importlib.machinery import ExtensionFileLoader
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from epo_kernels import backends
from epo_kernels.backends import cuda, native
from epo_kernels.fused import ops
from epo_kernels.fused.backend import FusedBackend

ROOT = Path(__file__).resolve().parents[2]
CMAKE = shutil.which("cmake") or shutil.which("cmake", path=Path(sys.executable).parent)
NEEDS_COMPILER = pytest.mark.skipif(
    CMAKE is None or shutil.which("g++") is None, reason="needs cmake and g++ to build the emulator"
)
ITEM_SIZES = {"float64": 8, "int64": 8, "float32": 4, "int32": 4, "float16": 2, "bfloat16": 2, "bool": 1}
# The arguments that a launch fills, by their places; one of cuda_loss is room to work in.
RESULTS = {
    "cuda_statistics": range(1, 5),
    "cuda_spread": (4, 5),
    "cuda_gradient": (7,),
    "cuda_loss": range(2, 8),
    "cuda_prepare": range(9, 14),
    "cuda_scale": (2,),
}
WORKSPACE = 7
H200_SHARED_BYTES = 232_448  # that a block may ask for


def build(target: str = "_native") -> Path:
    """Builds the parts that changed; returns the path of the module or program. Safe for concurrent tests."""
    import pybind11

    folder = ROOT / "build" / "emulated"
    folder.mkdir(parents=True, exist_ok=True)
    options = {
        "EPO_CUDA": "emulated",
        "CMAKE_CXX_COMPILER": "g++",  # GCC's instrumentation
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.get_cmake_dir(),
    }
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in (
            (CMAKE, "-S", ROOT, "-B", folder, *(f"-D{name}={value}" for name, value in options.items())),
            (CMAKE, "--build", folder, "--target", target, "--parallel", "2"),
        ):
            done = subprocess.run(command, capture_output=True, text=True, timeout=600)
            assert done.returncode == 0, done.stdout + done.stderr
    (built,) = (path for path in folder.rglob(f"{target}*") if path.is_file() and path.suffix in ("", ".so"))
    return built


def shared_bytes(slots: int) -> int:
    """Shared memory of a chip whose rings have that many slots a warp: ring_plan in csrc/tile_math.h, one block."""
    return 4096 + slots * 4 * 2048


class Emulator:
    """The module, and the properties of its GPU.

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
        self.module.Rows = self._rows
        for name in RESULTS:
            setattr(self.module, name, partial(self._call, name))
        self._layouts: dict[Any, tuple] = {}  # of the arrays made for the next launch
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
        layout = (ctypes.c_uint64(pointer), ctypes.c_int64(ITEM_SIZES[dtype]), len(sizes), *numbers)
        self._library.emulator_allow(*layout)
        self._layouts[made] = layout
        return made

    def _rows(self, logits, *others):
        made = self._native.Rows(logits, *others)
        self._layouts[made] = self._layouts[logits]
        return made

    def _call(self, name: str, *arguments):
        """Of the arguments, those that RESULTS names hold nothing yet; logits that are overwritten do."""
        for place in RESULTS[name]:
            layout = self._layouts.get(arguments[place])
            if layout is not None and layout[0].value != self._layouts[arguments[0]][0].value:
                self._library.emulator_expect(*layout, place != WORKSPACE)
        self._layouts.clear()
        return getattr(self._native, name)(*arguments)


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
