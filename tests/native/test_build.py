"""The results of a build: kernels without spills, and a working install even if nothing can be compiled."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from epo_kernels.backends.native import native

ROOT = Path(__file__).resolve().parents[2]
_native = native()


def cuobjdump():
    """CUDA's own, or the one in Triton's wheel."""
    try:
        from triton.backends import nvidia
    except ImportError:
        return shutil.which("cuobjdump")
    return shutil.which("cuobjdump") or shutil.which("cuobjdump", path=Path(nvidia.__file__).parent / "bin")


@pytest.mark.skipif(_native.cuda_missing is not None, reason=f"no CUDA kernels here: {_native.cuda_missing}")
@pytest.mark.skipif(cuobjdump() is None, reason="needs cuobjdump, of CUDA or of Triton's wheel")
def test_no_cuda_kernel_spills(capsys):
    """Registers and shared memory of every kernel, for every chip; what the ring takes dynamically comes on top."""
    report = subprocess.run(
        [cuobjdump(), "-res-usage", _native.__file__], capture_output=True, text=True, timeout=120, check=True
    )
    demangled = subprocess.run(["c++filt"], input=report.stdout + report.stderr, capture_output=True, text=True).stdout
    chip, name, table = "", "", []
    for line in demangled.splitlines():
        if match := re.search(r"arch = (sm_\w+)", line):
            chip = match[1]
        elif match := re.search(r"Function (.*):$", line.strip()):
            name = re.sub(r"epo::|void |\(.*|TwoByteElement<|Functions>|Element", "", match[1]).strip()
        elif match := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            table.append((chip, name, *map(int, match.groups())))
    with capsys.disabled():
        titles = ("chip", "kernel", "registers", "stack", "shared", "local")
        lines = ["{:8}{:46}{:>10}{:>7}{:>8}{:>7}".format(*row) for row in (titles, *sorted(set(table)))]
        sys.stdout.write("\n" + "\n".join(lines) + "\n")
    chips = {f"sm_{arch}" for arch in _native.cuda_archs.split(",")}
    assert {row[0] for row in table} == chips
    assert sum("ring::loss_kernel" in row[1] for row in table) == 2 * len(chips)  # float32 and bfloat16
    assert not [row for row in table if row[3] or row[5]], "a kernel keeps registers in local memory"


def build(tmp_path, **environment):
    """Runs setup.py in a copy of the files it needs; (output, whether a module was built)."""
    for name in ("setup.py", "pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("csrc", "python"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "epo_kernels", tmp_path / "epo_kernels", ignore=shutil.ignore_patterns("*.so", "train"))
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=tmp_path,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr, bool(list((tmp_path / "epo_kernels").glob("_native*.so")))


def test_without_a_compiler_the_package_still_installs_and_says_what_is_missing(tmp_path):
    output, built = build(tmp_path, CXX="/nowhere/c++", EPO_KERNELS_CUDA="off")
    assert not built
    assert "the native module was not built; other backends remain" in output
    script = (
        # Otherwise this project's editable install would provide its module to the copy.
        "import sys; sys.meta_path = [finder for finder in sys.meta_path if 'editable' not in str(finder)];"
        "import epo_kernels as ek, torch; print(ek.available_backends()['cpu']);"
        "print(ek.backends.choose_backend('auto', torch.device('cpu')).name);"
        "ek.backends.choose_backend('cpu', torch.device('cpu'))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    reason, chosen = done.stdout.splitlines()
    assert "is not built (No module named 'epo_kernels._native')" in reason
    assert "install a C++17 compiler" in reason
    assert chosen == "reference"
    assert "RuntimeError: backend='cpu' cannot run here: the native module is not built" in done.stderr
