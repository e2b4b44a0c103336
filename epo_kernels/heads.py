"""The output head of a causal LM of transformers: from its last hidden states to its logits.

The linear losses need to know what a model does there. The names differ by family, so they are read here, for the
driver and both adapters, and compared with the model's own logits. transformers itself isn't imported.
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

# What the families' configs call c of c·tanh(x / c), a factor on the logits, and a divisor of them.
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # Gemma, RecurrentGemma, xLSTM
FACTORS = ("logit_scale", "lm_head_multiplier", "output_multiplier")  # Cohere, Falcon-H1, MuseGlimmer
DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")  # Granite and MiniCPM3, Inkling

LARGEST = (0.0, 1.0, 10.0, 100.0)  # of the logits compared: 0 shows a bias, 100 a softcap, the others a scale
TOLERANCE, LOW_PRECISION_TOLERANCE = 0.003, 0.03  # of the largest logit


@dataclass(frozen=True)
class Head:
    """logits = softcap tanh(scale (hidden weightᵀ + bias) / softcap), of which the first vocab_size count.

    Attributes:
        weight: (V, D), the parameter itself, or made from parameters with their gradients.
        bias: (V,) or None.
        logit_scale, logit_softcap: numbers; None where the model has none.
        vocab_size: entries that are vocabulary; None for all V.
    """

    weight: Tensor
    bias: Tensor | None = None
    logit_scale: float | None = None
    logit_softcap: float | None = None
    vocab_size: int | None = None

    @property
    def keywords(self) -> dict[str, Any]:
        """The head as arguments of `linear_epo_loss` and `linear_log_probs_and_entropy`, but for the weight."""
        names = ("bias", "logit_scale", "logit_softcap", "vocab_size")
        return {name: getattr(self, name) for name in names}

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., vocab_size) float32, by PyTorch's own operations."""
        logits = F.linear(hidden, self.weight, self.bias)[..., : self.vocab_size].float()
        if self.logit_scale is not None:
            logits = logits * self.logit_scale
        if self.logit_softcap is not None:
            logits = self.logit_softcap * torch.tanh(logits / self.logit_softcap)
        return logits


def head_of(model: Any) -> Head:
    """The head of a `PreTrainedModel` as its config and its output layer tell it; read it again for every pass.

    PEFT's `modules_to_save` and `trainable_token_indices` on the head are part of its weight.

    Raises:
        ValueError: no output layer, one that is quantised, or one with an adapter whose product isn't a weight (LoRA).
    """
    name, layer, config = type(model).__name__, model.get_output_embeddings(), model.config.get_text_config()
    if layer is None:
        raise ValueError(f"{name} must have an output layer of logits, but its get_output_embeddings() is None")
    weight = _weight(name, layer)
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        kind = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise ValueError(f"{name}'s output layer must have a floating-point weight, got {kind}: don't quantise it")
    # PEFT's wrapper of single tokens has no bias, and its product leaves the layer's out.
    return Head(
        weight,
        getattr(layer, "bias", None),
        _scale(config),
        _first(config, SOFTCAPS),
        getattr(config, "unpadded_vocab_size", None),
    )


@torch.no_grad()
def check_head(model: Any, forward: Callable[..., Any] | None = None) -> None:
    """Compare `head_of` with what the model itself makes of given hidden states.

    The layers below the head don't run: for the time of the call, the decoder answers with hidden states whose logits
    range from small to large. So it costs a product of four rows, and works wherever the head's weight is whole. Where
    it isn't (on the meta device, a DTensor), nothing is compared.

    Args:
        model: a `PreTrainedModel` in any mode, on any device.
        forward: the model's forward, where its class has been given another.

    Raises:
        ValueError: they differ, or see `head_of`. The message names the model.
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
            f"{name}'s logits can't be computed from its last hidden states alone: given these, its forward raises "
            f"{type(error).__name__} ({error})"
        ) from error
    found = head.logits(hidden)
    if found.shape != wanted.shape:
        raise ValueError(
            f"{name}'s logits must be {found.shape[-1]} wide, as its output layer is, got {tuple(wanted.shape)}"
        )
    differences = (found - wanted).abs().amax(dim=(0, 2))
    low_precision = head.weight.dtype in (torch.float16, torch.bfloat16)
    allowed = wanted.abs().amax(dim=(0, 2)) * (LOW_PRECISION_TOLERANCE if low_precision else TOLERANCE)
    if not bool((differences <= allowed).all()):  # NaN is a difference too
        raise ValueError(
            f"{name} does more between its last hidden states and its logits than a matrix product, a bias, a scale "
            f"and a softcap: its logits differ from these by up to {float(differences.max()):.3g}, with the scale "
            f"{head.logit_scale} and softcap {head.logit_softcap} of its config. A loss computed from hidden states "
            "can't serve it"
        )


def _weight(name: str, layer: Any) -> Any:
    """The weight that the layer multiplies by."""
    if hasattr(layer, "get_merged_weights"):  # PEFT's layer of single tokens, whose `weight` is without them
        return layer.get_merged_weights([] if layer.disable_adapters else layer.active_adapters)
    if hasattr(layer, "base_layer"):  # an adapter of PEFT: its `weight` would be the frozen one
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
        # HyperCLOVAX has Granite's name for a factor.
        factor = divisor if config.model_type.startswith("hyperclovax") else 1 / divisor
    return factor


def _hidden_states(head: Head) -> Tensor:
    """(1, 4, D) of the weight's dtype: random directions, whose largest scaled logits are `LARGEST`."""
    weight = head.weight
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, len(LARGEST), weight.shape[1], generator=draw).to(weight)
    largest = F.linear(hidden, weight).float().abs().amax(dim=-1, keepdim=True) * abs(head.logit_scale or 1.0)
    sizes = torch.tensor(LARGEST, device=weight.device)[:, None]
    return (hidden.float() * torch.where(largest > 0, sizes / largest, sizes)).to(weight.dtype)


class _DecoderOutput(tuple[Tensor]):
    """What a decoder gives back, of which only the last hidden states are there."""

    @property
    def last_hidden_state(self) -> Tensor:
        return self[0]

    def __getattr__(self, name: str) -> None:
        return None


@contextmanager
def _decoder_answers(model: Any, hidden: Tensor) -> Iterator[None]:
    """Inside, the model below its head gives these hidden states for any input."""
    output = _DecoderOutput((hidden,))
    decoders = [part for part in {model.base_model, model.get_decoder()} if part is not None and part is not model]
    if not decoders:
        raise ValueError("it must have a decoder apart from its head, in base_model or get_decoder()")
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
