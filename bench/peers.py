"""Other libraries, if installed, called as documented. The expected versions are in `VERSIONS`.

Most compute less than we do; each one's contract states its outputs, which the gate checks. A wheel is enough: kernels
are loaded without the packages' own `__init__`, whose imports they do not need.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from bench.cases import Case
from bench.implementations import Implementation, Run, with_gradients
from bench.inputs import Inputs
from bench.truth import POLICY_CONFIG, without_last

# The versions for which the adapters below were written.
VERSIONS = {
    "trl": "1.16.0",
    "liger-kernel": "0.8.5",
    "verl": "0.9.1",
    "cut-cross-entropy": "25.1.1",
    "quack-kernels": "0.2.4",
}
IGNORED = -100


def peers(case: Case, device: torch.device) -> list[Implementation]:
    """The peers that apply to this case, installed or not."""
    on_gpu = device.type == "cuda"
    if case.task == "loss":
        rows = [
            _peer("TRL logprob_entropy", "statistics", trl_statistics),
            _peer("Liger grpo_loss", "shifted policy loss", liger_grpo_loss),
            _peer("quack cross_entropy", "cross-entropy", quack_cross_entropy),
        ]
        return rows if on_gpu else []
    if case.task == "score":
        return [_peer("TRL logprob_entropy", "scores", trl_scores)] if on_gpu else []
    if case.task == "linear-score":
        found = [_peer("TRL chunked_logprob", "scores", lambda: trl_chunked(gradient=False))]
        return [*found, _peer("Liger FSLCE", "scores", lambda: liger_fslce(gradient=False))]
    found = [
        _peer("TRL chunked_logprob", "statistics", lambda: trl_chunked(gradient=True)),
        _peer("Liger FSLCE", "statistics", lambda: liger_fslce(gradient=True)),
        _peer("Liger fused linear GRPO", "policy loss", liger_fused_linear_grpo),
    ]
    if on_gpu:
        found += [
            _peer("verl linear_cross_entropy", "statistics", verl_linear_cross_entropy),
            _peer("cut-cross-entropy", "cross-entropy", cut_cross_entropy, "no gradient filter"),
            _peer("quack linear CE", "cross-entropy", quack_linear_cross_entropy, "products not tuned"),
        ]
    return found


def _peer(name: str, contract: str, build: Callable[[], Run], note: str = "") -> Implementation:
    return Implementation(name, contract, build, note)


def installed() -> dict[str, str]:
    """{distribution: version} of the installed ones."""
    found = {}
    for name in VERSIONS:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


# logits in ------------------------------------------------------------------------------------------------------------


def trl_statistics() -> Run:
    function = load("trl.kernels.logprob_entropy").selective_log_softmax_and_entropy

    def run(inputs: Inputs) -> dict[str, Tensor]:
        log_probs, entropy = function(inputs.logits, inputs.tokens, 1.0, inputs.mask)
        return _statistics(inputs, log_probs, entropy)

    return run


def trl_scores() -> Run:
    function = load("trl.kernels.logprob_entropy").selective_log_softmax_and_entropy

    def run(inputs: Inputs) -> dict[str, Tensor]:
        with torch.no_grad():
            log_probs, entropy = function(inputs.logits, inputs.tokens, 1.0, inputs.mask)
        return {"log_probs": log_probs, "entropy": entropy}

    return run


def liger_grpo_loss() -> Run:
    function = import_module("liger_kernel.ops").GrpoLossFunction
    cfg = POLICY_CONFIG

    def run(inputs: Inputs) -> dict[str, Tensor]:
        counted = without_last(inputs.mask)[:, :-1].contiguous()  # its logits have one more position than its tokens
        others = (inputs.old_log_probs, inputs.ref_log_probs, inputs.tokens)
        old, ref, tokens = (values[:, :-1].contiguous() for values in others)
        clips = (1.0, cfg.kl_coeff, cfg.clip_ratio_low, cfg.clip_ratio_high)
        # inplace=False, because the logits are reused. "bnpo" is the mean over counted tokens.
        loss, *_ = function.apply(
            inputs.logits, old, ref, tokens, inputs.advantages, counted, *clips, False, "bnpo", None, True
        )
        return with_gradients({"loss": loss}, loss, inputs)

    return run


def quack_cross_entropy() -> Run:
    function = import_module("quack.cross_entropy").cross_entropy

    def run(inputs: Inputs) -> dict[str, Tensor]:
        loss = function(_flat(inputs), _labels(inputs), ignore_index=IGNORED)
        return with_gradients({"loss": loss}, loss, inputs)

    return run


# hidden states in -----------------------------------------------------------------------------------------------------


def trl_chunked(gradient: bool) -> Run:
    # In backward the module requests the head of a sharded model from the trainer; here the head is whole.
    stubs = {"trl.trainer.utils": {"maybe_gather_lm_head_ctx": lambda *_: contextlib.nullcontext()}}
    function = load("trl.kernels.chunked_logprob", stubs).ChunkedLogProbFunction
    width = 16_384  # columns of a tile

    def run(inputs: Inputs) -> dict[str, Tensor]:
        rows = inputs.mask.flatten().nonzero()[:, 0]  # it has no mask argument: its caller drops rows
        hidden = _flat(inputs)[rows]
        tokens = inputs.tokens.flatten()[rows]
        arguments = (hidden, inputs.weight, None, tokens, 1.0, width, None, 1.0, ("entropy",))
        with contextlib.nullcontext() if gradient else torch.no_grad():
            log_probs, entropy, *_ = function.apply(*arguments)
        return _statistics_of_rows(inputs, rows, log_probs, entropy, gradient)

    return run


def liger_fslce(gradient: bool) -> Run:
    function = import_module("liger_kernel.ops").LigerFusedLinearScaledCrossEntropyFunction

    def run(inputs: Inputs) -> dict[str, Tensor]:
        with contextlib.nullcontext() if gradient else torch.no_grad():
            loss, entropy = function.apply(_flat(inputs), inputs.weight, _labels(inputs), return_entropy=True)
        shape = inputs.tokens.shape
        log_probs, entropy = -loss.reshape(shape), entropy.reshape(shape)
        if gradient:
            return _statistics(inputs, log_probs, entropy)
        return {"log_probs": log_probs, "entropy": entropy}

    return run


def liger_fused_linear_grpo() -> Run:
    module = import_module("liger_kernel.chunked_loss").LigerFusedLinearGRPOLoss
    cfg = POLICY_CONFIG
    # "bnpo" is the mean over counted tokens; if reference log-probs are given, no reference model runs.
    loss_of = module(
        beta=cfg.kl_coeff,
        epsilon_low=cfg.clip_ratio_low,
        epsilon_high=cfg.clip_ratio_high,
        loss_type="bnpo",
        use_ref_model=True,
    )

    def run(inputs: Inputs) -> dict[str, Tensor]:
        loss, _ = loss_of(
            inputs.hidden,
            inputs.weight,
            inputs.tokens,
            inputs.mask.to(inputs.rows[0].dtype),
            inputs.advantages,
            ref_per_token_logps=inputs.ref_log_probs,
            old_per_token_logps=inputs.old_log_probs,
        )
        return with_gradients({"loss": loss}, loss, inputs)

    return run


def verl_linear_cross_entropy() -> Run:
    stubs = {
        "verl.utils.device": {
            "get_device_capability": torch.cuda.get_device_capability,
            "get_device_name": lambda: "cuda",
            "get_torch_device": lambda: torch.cuda,
            "is_cuda_available": True,
        }
    }
    function = load("verl.utils.kernel.linear_cross_entropy", stubs).linear_cross_entropy

    def run(inputs: Inputs) -> dict[str, Tensor]:
        rows = inputs.mask.flatten().nonzero()[:, 0]  # it has no mask argument: its caller drops rows
        hidden = _flat(inputs)[rows]
        log_probs, entropy = function(hidden, inputs.weight, inputs.tokens.flatten()[rows], 1.0, "none", None)
        return _statistics_of_rows(inputs, rows, log_probs, entropy, gradient=True)

    return run


def cut_cross_entropy() -> Run:
    function = import_module("cut_cross_entropy").linear_cross_entropy

    def run(inputs: Inputs) -> dict[str, Tensor]:
        # Its filter skips small gradients, which is right for a confident model and wrong for random logits.
        loss = function(_flat(inputs), inputs.weight, _labels(inputs), ignore_index=IGNORED, filter_eps=None)
        return with_gradients({"loss": loss}, loss, inputs)

    return run


def quack_linear_cross_entropy() -> Run:
    function = import_module("quack.linear_cross_entropy").chunked_linear_cross_entropy

    def run(inputs: Inputs) -> dict[str, Tensor]:
        rows = _flat(inputs)
        # tuned=True tries dozens of kernels for minutes before the first result.
        loss = function(rows, inputs.weight, _labels(inputs), chunk_size=4096, ignore_index=IGNORED, tuned=False)
        return with_gradients({"loss": loss}, loss, inputs)

    return run


# what they share ------------------------------------------------------------------------------------------------------


def _flat(inputs: Inputs) -> Tensor:
    """Logits (N, V) or hidden states (N, D)."""
    return inputs.rows[0].flatten(0, 1)


def _labels(inputs: Inputs) -> Tensor:
    return torch.where(inputs.mask, inputs.tokens, IGNORED).flatten()


def _statistics(inputs: Inputs, log_probs: Tensor, entropy: Tensor) -> dict[str, Tensor]:
    """Both statistics (B, T), and their gradients for the given upstream gradients."""
    upstream = [torch.where(inputs.mask, gradient, 0.0) for gradient in inputs.upstream]
    outputs = {"log_probs": log_probs, "entropy": entropy}
    return with_gradients(outputs, [log_probs, entropy], inputs, [u.to(log_probs.dtype) for u in upstream])


def _statistics_of_rows(
    inputs: Inputs, rows: Tensor, log_probs: Tensor, entropy: Tensor, gradient: bool
) -> dict[str, Tensor]:
    """The same, from statistics (n,) of the counted tokens."""

    def whole(values: Tensor) -> Tensor:
        return values.new_zeros(inputs.tokens.numel()).index_copy(0, rows, values.detach()).view(inputs.tokens.shape)

    outputs = {"log_probs": whole(log_probs), "entropy": whole(entropy)}
    if not gradient:
        return outputs
    return with_gradients(outputs, [log_probs, entropy], inputs, [u.flatten()[rows] for u in inputs.upstream])


def load(module: str, stubs: dict[str, dict[str, Any]] | None = None) -> ModuleType:
    """Import a module of an installed package without running the `__init__` of the packages above it.

    Args:
        module: full module name.
        stubs: {module name: contents} of modules that replace real ones.

    Raises:
        ImportError: the package is not installed, or the module needs one that is not.
    """
    if module in sys.modules:
        return sys.modules[module]
    top, *parts = module.split(".")[:-1]
    spec = find_spec(top)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"No module named {top!r}", name=top)
    name, folder = top, spec.submodule_search_locations[0]
    _package(name, folder)
    for part in parts:
        name, folder = f"{name}.{part}", f"{folder}/{part}"
        _package(name, folder)
    for stub, contents in (stubs or {}).items():
        _package(stub.rpartition(".")[0], "")
        sys.modules[stub] = ModuleType(stub)
        vars(sys.modules[stub]).update(contents)
    return import_module(module)


def _package(name: str, folder: str) -> None:
    """An empty package with this folder as its path; an existing package of that name is kept."""
    if name not in sys.modules:
        package = ModuleType(name)
        package.__path__ = [folder]
        package.__spec__ = ModuleSpec(name, None, is_package=True)  # `find_spec` wants one
        package.__spec__.submodule_search_locations = [folder]
        sys.modules[name] = package
