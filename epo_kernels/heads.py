"""The output head of a transformers causal LM: from its last hidden states to its logits.

The linear losses must reproduce the model's own head. Config names differ by family, so they are read here, for the
driver and both adapters, and the result is compared with the model's own logits. transformers itself is not imported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

# Config names, by family, for c in c·tanh(x / c), for a multiplier of the logits, and for a divisor.
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # Gemma, RecurrentGemma, xLSTM
FACTORS = ("logit_scale", "lm_head_multiplier", "output_multiplier")  # Cohere, Falcon-H1, MuseGlimmer
DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")  # Granite and MiniCPM3, Inkling

LARGEST = (0.0, 1.0, 10.0, 100.0)  # of the compared logits: 0 reveals a bias, 100 a softcap, the others a scale
TOLERANCE, LOW_PRECISION_TOLERANCE = 0.003, 0.03  # relative to the largest logit


@dataclass(frozen=True)
class Head:
    """logits = softcap tanh(scale (hidden weightᵀ + bias) / softcap), restricted to the first vocab_size entries.

    Attributes:
        weight: (V, D), the parameter itself, or computed from parameters with gradients intact.
        bias: (V,) or None.
        logit_scale, logit_softcap: numbers; None if the model has none.
        vocab_size: number of real vocabulary entries; None for all V.
    """

    weight: Tensor
    bias: Tensor | None = None
    logit_scale: float | None = None
    logit_softcap: float | None = None
    vocab_size: int | None = None

    @property
    def keywords(self) -> dict[str, Any]:
        """The head as arguments of `linear_epo_loss` and `linear_log_probs_and_entropy`, without the weight."""
        names = ("bias", "logit_scale", "logit_softcap", "vocab_size")
        return {name: getattr(self, name) for name in names}

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., vocab_size) float32, in eager PyTorch."""
        logits = F.linear(hidden, self.weight, self.bias)[..., : self.vocab_size].float()
        if self.logit_scale is not None:
            logits = logits * self.logit_scale
        if self.logit_softcap is not None:
            logits = self.logit_softcap * torch.tanh(logits / self.logit_softcap)
        return logits


def head_of(model: Any) -> Head:
    """The head of a `PreTrainedModel`, read from its config and output layer; call it again for every pass.

    PEFT's `modules_to_save` and `trainable_token_indices` on the head are included in the weight.

    Raises:
        ValueError: no output layer, a quantised one, or one with an adapter that is not merged into a weight (LoRA).
    """
    name, layer, config = type(model).__name__, model.get_output_embeddings(), model.config.get_text_config()
    if layer is None:
        raise ValueError(f"{name} must have an output layer of logits, but its get_output_embeddings() is None")
    weight = _weight(name, layer)
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        kind = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise ValueError(f"{name}'s output layer must have a floating-point weight, got {kind}: do not quantise it")
    # PEFT's wrapper for trainable tokens has no bias attribute, and its product omits the layer's bias.
    return Head(
        weight,
        getattr(layer, "bias", None),
        _scale(config),
        _first(config, SOFTCAPS),
        getattr(config, "unpadded_vocab_size", None),
    )


@torch.no_grad()
def check_head(model: Any, forward: Callable[..., Any] | None = None) -> None:
    """Compare `head_of` with the model's own logits for given hidden states.

    The layers below the head do not run: for the duration of the call, the decoder returns hidden states whose logits
    range from small to large. The check costs a product of four rows and works wherever the head's weight is whole;
    otherwise (on the meta device, or a DTensor) nothing is compared.

    Args:
        model: a `PreTrainedModel` in any mode, on any device.
        forward: the model's forward, if it replaces the class's own.

    Raises:
        ValueError: the logits differ, or see `head_of`. The message names the model.
    """
    head, name = head_of(model), type(model).__name__
    if head.weight.is_meta or isinstance(head.weight, DTensor):
        return
    hidden = _hidden_states(head)
    ids = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=hidden.device)
    try:
        with _decoder_answers(model, hidden):
            wanted = (forward or model)(input_ids=ids, use_cache=False, return_dict=True).logits.float()
    except Exception as error:
        raise ValueError(
            f"{name}'s logits cannot be computed from its last hidden states alone: given these, its forward raises "
            f"{type(error).__name__} ({error})"
        ) from error
    found = head.logits(hidden)
    if found.shape != wanted.shape:
        raise ValueError(
            f"{name}'s logits must be as wide as its output layer, {found.shape[-1]}, got {tuple(wanted.shape)}"
        )
    differences = (found - wanted).abs().amax(dim=(0, 2))
    low_precision = head.weight.dtype in (torch.float16, torch.bfloat16)
    allowed = wanted.abs().amax(dim=(0, 2)) * (LOW_PRECISION_TOLERANCE if low_precision else TOLERANCE)
    if not bool((differences <= allowed).all()):  # NaN counts as a difference
        raise ValueError(
            f"{name} does more between its last hidden states and its logits than a matrix product, a bias, a scale "
            f"and a softcap: its logits differ from these by up to {float(differences.max()):.3g}, with the scale "
            f"{head.logit_scale} and softcap {head.logit_softcap} of its config. Losses computed from hidden states do "
            "not support this model; compute the loss from its logits"
        )


def _weight(name: str, layer: Any) -> Any:
    """The weight that the layer effectively multiplies by."""
    if hasattr(layer, "get_merged_weights"):  # PEFT's layer for trainable tokens, whose `weight` lacks them
        return layer.get_merged_weights([] if layer.disable_adapters else layer.active_adapters)
    if hasattr(layer, "base_layer"):  # a PEFT adapter, whose `weight` would be the frozen one
        raise ValueError(
            f"{name}'s output layer must have no adapter, got {type(layer).__module__}.{type(layer).__name__}: leave "
            "it out of target_modules; modules_to_save trains all of it, trainable_token_indices single tokens"
        )
    return layer.weight


def _first(config: Any, names: tuple[str, ...]) -> float | None:
    values = (getattr(config, name, None) for name in names)
    return next((value for value in values if isinstance(value, (int, float))), None)


def _scale(config: Any) -> float | None:
    factor, divisor = _first(config, FACTORS), _first(config, DIVISORS)
    if factor is None and divisor is not None:
        # HyperCLOVAX uses Granite's name for a multiplier.
        factor = divisor if config.model_type.startswith("hyperclovax") else 1 / divisor
    return factor


def _hidden_states(head: Head) -> Tensor:
    """(1, 4, D) in the weight's dtype: random directions whose largest scaled logits are `LARGEST`."""
    weight = head.weight
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, len(LARGEST), weight.shape[1], generator=draw).to(weight)
    largest = F.linear(hidden, weight).float().abs().amax(dim=-1, keepdim=True) * abs(head.logit_scale or 1.0)
    sizes = torch.tensor(LARGEST, device=weight.device)[:, None]
    return (hidden.float() * torch.where(largest > 0, sizes / largest, sizes)).to(weight.dtype)


class _DecoderOutput(tuple[Tensor]):
    """A decoder's output that contains only the last hidden states."""

    @property
    def last_hidden_state(self) -> Tensor:
        return self[0]

    def __getattr__(self, name: str) -> None:
        return None


@contextmanager
def _decoder_answers(model: Any, hidden: Tensor) -> Iterator[None]:
    """Within this context, the model below its head returns these hidden states for any input."""
    output = _DecoderOutput((hidden,))
    decoders = [part for part in {model.base_model, model.get_decoder()} if part is not None and part is not model]
    if not decoders:
        raise ValueError("it must have a decoder separate from its head, in base_model or get_decoder()")
    own = {part: part.__dict__.get("forward") for part in decoders}
    for part in decoders:
        part.forward = lambda *args, **kwargs: output
    try:
        yield
    finally:
        for part, forward in own.items():
            if forward is None:
                del part.forward
            else:
                part.forward = forward
