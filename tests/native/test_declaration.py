"""The generated header with names and orders for csrc/, and the module that records them."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from epo_kernels.backends import native
from epo_kernels.declaration import COEFFICIENTS, NATIVE_NAMES, ROW_SUMS

ROOT = Path(__file__).resolve().parents[2]
DECLARATION = ROOT / "epo_kernels" / "declaration.py"


def generate(declaration, out):
    subprocess.run([sys.executable, ROOT / "csrc" / "generate.py", declaration, out], check=True, timeout=60)
    return out.read_text()


def test_a_declared_penalty_coefficient_and_sum_reach_cpp(tmp_path):
    text = DECLARATION.read_text()
    text = text.replace('"gate"]', '"gate", "cubic"]').replace('    "kl_coeff",\n', '    "kl_coeff",\n    "cube",\n')
    (tmp_path / "declaration.py").write_text(
        text.replace('    "invalid_tokens",', '    "cubes",\n    "invalid_tokens",')
    )
    header = generate(tmp_path / "declaration.py", tmp_path / "new" / "declaration.h")
    assert "enum class Penalty : int { none, hinge, quadratic, indicator, gate, cubic };" in header
    assert "    float cube;\n" in header
    assert f"kNumCoefficients = {len(COEFFICIENTS) + 1};" in header
    assert "        cubes,\n        invalid_tokens,\n" in header
    assert f"kNumSums = {len(ROW_SUMS) + 1};" in header


def test_an_unchanged_header_is_not_written_again(tmp_path):
    out = tmp_path / "declaration.h"
    generate(DECLARATION, out)
    before = out.stat().st_mtime_ns
    generate(DECLARATION, out)
    assert out.stat().st_mtime_ns == before
    out.write_text("// stale\n")
    assert "enum class Penalty" in generate(DECLARATION, out)


def test_the_module_was_built_from_this_declaration():
    assert native.native().declared_names == NATIVE_NAMES


@pytest.mark.parametrize(
    "built", [{"declared_names": {**NATIVE_NAMES, "Penalty": ("none",)}}, {"declared_names": {}}, {}]
)
def test_a_module_from_another_declaration_is_refused(built):
    reason = native._why_stale(SimpleNamespace(__file__="_native.so", **built))
    assert reason is not None
    assert "Penalty" in reason
    assert "pip install -v -e ." in reason
