"""csrc/ under AddressSanitizer and UBSan: CPU kernels, thread pool, and the CUDA ring's tree walked on the host."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CMAKE = shutil.which("cmake") or shutil.which("cmake", path=Path(sys.executable).parent)


@pytest.mark.skipif(CMAKE is None or shutil.which("g++") is None, reason="needs cmake and g++ to build the checks")
def test_native_code_is_clean_under_sanitizers(tmp_path):
    def run(*command):
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run(CMAKE, "-S", ROOT, "-B", tmp_path, "-DEPO_CHECKS=ON")
    run(CMAKE, "--build", tmp_path, "--parallel", "2")
    assert run(tmp_path / "epo_checks").endswith("all checks passed\n")
    for objects in tmp_path.glob("CMakeFiles/epo_sweeps_*.dir/csrc/*.o"):
        # A weak function could be linked for the whole library, with instructions that a processor lacks.
        assert not [line for line in run("nm", objects).splitlines() if line.split()[-2] == "W"]
