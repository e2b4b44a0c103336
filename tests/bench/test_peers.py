"""Peers' modules are loaded without their packages' own imports."""

import sys

import pytest
import torch

from bench.cases import GPU
from bench.peers import load
from bench.roster import implementations
from bench.truth import CONTRACTS


@pytest.fixture
def package(tmp_path, monkeypatch):
    folder = tmp_path / "peer_for_test" / "kernels"
    folder.mkdir(parents=True)
    (tmp_path / "peer_for_test" / "__init__.py").write_text("raise RuntimeError('needs a whole cluster')")
    (folder / "__init__.py").write_text("raise RuntimeError('and this too')")
    (folder / "fast.py").write_text("from peer_for_test.utils.device import name\nfrom . import slow\nVALUE = name()")
    (folder / "slow.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    yield "peer_for_test.kernels.fast"
    for name in [name for name in sys.modules if name.startswith("peer_for_test")]:
        del sys.modules[name]


def test_load_passes_by_the_packages_above(package):
    stubs = {"peer_for_test.utils.device": {"name": lambda: "stub"}}
    assert load(package, stubs).VALUE == "stub"
    assert load(package) is sys.modules[package]


def test_load_says_what_is_not_installed():
    with pytest.raises(ImportError, match="no_such_peer"):
        load("no_such_peer.kernels.fast")


def test_every_peer_is_labelled_with_what_it_computes():
    named = {entry.name: entry for case in GPU for entry in implementations(case, torch.device("cuda"))}
    assert {entry.contract for entry in named.values()} <= CONTRACTS.keys()
    assert {"TRL logprob_entropy", "Liger grpo_loss", "Liger FSLCE", "verl linear_cross_entropy"} <= named.keys()
    assert {"TRL chunked_logprob", "cut-cross-entropy", "quack linear CE", "Liger fused linear GRPO"} <= named.keys()
    assert "no entropy" in named["quack linear CE"].computes
    assert "no loss" in named["TRL logprob_entropy"].computes
