"""The implementations measured in a case: this library, eager PyTorch, and other libraries."""

from __future__ import annotations

from functools import partial

import torch

from bench.cases import Case
from bench.implementations import COMPILED, EAGER, Implementation, compiled, ours
from bench.peers import peers
from bench.truth import POLICY_FIELDS, contract_of

OURS = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}


def implementations(case: Case, device: torch.device) -> list[Implementation]:
    """Everything measured in a case on this kind of device, ours first."""
    if case.policies:
        return [_policy(case, backend, policy) for backend in OURS[device.type] for policy in POLICY_FIELDS]
    contract = "loss" if case.gradient else "scores"
    found = [
        Implementation(f"ours:{backend}", contract, partial(ours, case, backend), ours=True)
        for backend in OURS[device.type]
    ]
    found.append(Implementation(EAGER, contract, partial(ours, case, "reference"), eager_memory=True))
    if case.compiled:
        found.append(Implementation(COMPILED, contract, partial(compiled, case), "of eager", eager_memory=True))
    return found + (peers(case, device) if case.peers else [])


def _policy(case: Case, backend: str, policy: str) -> Implementation:
    return Implementation(
        f"ours:{backend} {policy}", contract_of(policy), partial(ours, case, backend, policy=policy), ours=True
    )
