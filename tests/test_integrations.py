"""The adapters' package: third-party packages are imported on request, and errors about missing ones name the fix."""

import subprocess
import sys
from importlib.metadata import PackageNotFoundError

import pytest

from epo_kernels import integrations

FOREIGN = ("trl", "verl", "peft", "accelerate", "transformers", "vllm")


def test_importing_the_library_imports_no_other_trainer():
    code = f"import sys, epo_kernels, epo_kernels.integrations; print([m for m in {FOREIGN} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_a_missing_package_gives_the_install_line(monkeypatch):
    def missing(package):
        raise PackageNotFoundError(package)

    monkeypatch.setattr(integrations, "version", missing)
    monkeypatch.delitem(sys.modules, "epo_kernels.integrations.trl", raising=False)
    with pytest.raises(ImportError, match=r'needs trl; install it with: pip install "epo-kernels\[trl\]"'):
        import epo_kernels.integrations.trl  # noqa: F401


@pytest.mark.parametrize("found", ["1.15.2", "0.29", "1.17.0", "2.0.0.dev0"])
def test_an_unfit_version_gives_the_install_line(monkeypatch, found):
    monkeypatch.setattr(integrations, "version", lambda package: found)
    with pytest.raises(ImportError, match=rf"trl >= 1\.16, < 1\.17, got {found}; install it with: pip install"):
        integrations.require("trl", at_least="1.16", below="1.17")


@pytest.mark.parametrize("found", ["1.16", "1.16.0", "1.16.4.post1"])
def test_a_fit_version_passes(monkeypatch, found):
    monkeypatch.setattr(integrations, "version", lambda package: found)
    integrations.require("trl", at_least="1.16", below="1.17")
