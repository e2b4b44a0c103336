"""Builds the native module with CMake; everything else is declared in pyproject.toml.

A short setuptools extension rather than scikit-build-core, for two reasons: a machine without a compiler must still get
the package with its other backends, and an editable install must find a new module next to the sources, without a hook
that rebuilds on import.

Environment variables:
    EPO_KERNELS_CUDA: "auto" (default) builds the CUDA kernels if nvcc is found, "off" omits them.
    EPO_KERNELS_CUDA_ARCHS: compute capabilities to compile for, such as "90a" or "80;90a"; default: see CMakeLists.txt.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
STUB = ROOT / "python" / "_native.pyi"
# Kept between builds, so that only changed files are recompiled.
BUILD = ROOT / "build" / f"native-{sys.implementation.cache_tag}"


class CMakeBuild(build_ext):
    def run(self) -> None:
        super().run()
        if self.inplace:  # setuptools copies the module next to the sources, but not its type stub
            shutil.copy2(STUB, ROOT / "epo_kernels")

    def build_extension(self, ext: Extension) -> None:
        module = Path(self.get_ext_fullpath(ext.name)).resolve()
        cuda = os.environ.get("EPO_KERNELS_CUDA", "auto")
        try:
            if cuda not in ("auto", "off"):
                raise ValueError(f"EPO_KERNELS_CUDA must be auto or off, got {cuda!r}")
            built = build_native_as_far_as_possible(cuda)
            module.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(built, module)
            shutil.copy2(STUB, module.parent)
        except (OSError, ImportError, subprocess.CalledProcessError) as error:
            # The extension is optional: setuptools continues, with this as a warning.
            raise CompileError(f"the native module was not built; other backends remain: {error}") from error


def build_native_as_far_as_possible(cuda: str) -> Path:
    """Build with CUDA if that compiles, otherwise without; the module says why its CUDA part is missing."""
    try:
        return build_native(cuda)
    except subprocess.CalledProcessError:
        if cuda == "off":
            raise
        return build_native("failed")


def build_native(cuda: str) -> Path:
    """Configure and build; returns the module. Raises CalledProcessError, OSError or ImportError on failure."""
    import pybind11

    cmake = shutil.which("cmake") or shutil.which("cmake", path=Path(sys.executable).parent)
    if cmake is None:
        raise FileNotFoundError("cmake was not found; install it (pip install cmake)")
    options = {
        "pybind11_DIR": pybind11.get_cmake_dir(),
        "Python_EXECUTABLE": sys.executable,
        "EPO_CUDA": cuda,
    }
    if archs := os.environ.get("EPO_KERNELS_CUDA_ARCHS"):
        options["EPO_CUDA_ARCHS"] = archs.replace(",", ";").replace(" ", ";")
    arguments = [f"-D{name}={value}" for name, value in options.items()]
    subprocess.run([cmake, "-S", ROOT, "-B", BUILD, *arguments], check=True)
    subprocess.run([cmake, "--build", BUILD, "--target", "_native", "--parallel", str(os.cpu_count() or 1)], check=True)
    (module,) = BUILD.glob("_native*.so")
    return module


setup(ext_modules=[Extension("epo_kernels._native", sources=[], optional=True)], cmdclass={"build_ext": CMakeBuild})
