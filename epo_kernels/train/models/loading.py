"""Loads causal LMs that are modified after construction and before loading, while on the meta device.

transformers builds a model on the meta device, then reads from the files what the model's parameters require: their
dtype and, for a DTensor, only the local shard. A model that is sharded before its weights are read is therefore never
whole in any process.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

from epo_kernels.train.models.files import check_weights

Prepare = Callable[[PreTrainedModel], None]


def load_causal_lm(
    source: str,
    prepare: Prepare | None = None,
    *,
    attn_implementation: str | None = None,
    local_files_only: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> PreTrainedModel:
    """`AutoModelForCausalLM.from_pretrained` in float32, from safetensors only, without running code from the source.

    Args:
        source: a folder or Hub id, of a model or of adapters.
        prepare: modifies the model before its weights are read, or afterwards if they cannot be read in parts.
        say: receives a warning about unused weights.

    Raises:
        ConfigError: weights are missing, have another shape, or are not finite.
    """
    options = {"attn_implementation": attn_implementation, "local_files_only": local_files_only}
    if prepare is None:
        return _loaded(AutoModelForCausalLM, source, options, say)
    prepared: list[PreTrainedModel] = []

    def prepare_early(model: PreTrainedModel) -> None:
        if _reads_in_parts(model):
            prepare(model)
            prepared.append(model)

    classes = _PreparedClasses(AutoModelForCausalLM._model_mapping, prepare_early)
    auto: Any = type(AutoModelForCausalLM.__name__, (AutoModelForCausalLM,), {"_model_mapping": classes})
    model = _loaded(auto, source, options, say)
    if not prepared:
        prepare(model)
    return model


def _loaded(auto: Any, source: str, options: dict[str, Any], say: Callable[[str], None]) -> PreTrainedModel:
    model, loading = auto.from_pretrained(
        source,
        dtype=torch.float32,
        **options,
        trust_remote_code=False,
        use_safetensors=True,  # other formats are pickles, which can execute code
        ignore_mismatched_sizes=True,  # `check_weights` names them
        output_loading_info=True,
    )
    check_weights(model, loading)
    if unused := sorted(loading["unexpected_keys"]):
        say(
            f"warning: {source}: {len(unused)} weights in its files are not used ({', '.join(unused[:3])}); if they "
            "are layers, num_hidden_layers in config.json is too small"
        )
    return model


def hold_products_in(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Store the weights of linear layers in the dtype that autocast would convert them to.

    Under autocast a frozen model then gives bit-identical results with less memory. Embeddings and norms stay in
    float32, because autocast does not convert them. So does a head that is tied to the embedding.
    """
    embedding = model.get_input_embeddings().weight
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.weight is not embedding:
            module.weight = nn.Parameter(module.weight.to(dtype), requires_grad=False)


def _reads_in_parts(model: PreTrainedModel) -> bool:
    """Whether a shard along the first dimension can be read without the rest of the parameter.

    If transformers joins, splits or permutes parameters along that dimension, shards of the parts give wrong results;
    dequantized parameters may too. Stacked experts are whole parts: a rank reads the experts of its shard.
    """
    if getattr(model.config, "quantization_config", None) is not None:
        return False
    converters = [c for c in get_model_conversion_mapping(model) if isinstance(c, WeightConverter)]
    return all(
        isinstance(operation, MergeModulelist) or (isinstance(operation, Concatenate) and operation.dim > 0)
        for converter in converters
        for operation in converter.operations
    )


class _PreparedClasses(Mapping[type, Any]):
    """A mapping from configurations to model classes whose constructor ends with `prepare(model)`."""

    def __init__(self, classes: Mapping[type, Any], prepare: Prepare) -> None:
        self._classes = classes
        self._prepare = prepare

    def __getitem__(self, config: type) -> Any:
        found = self._classes[config]
        return tuple(map(self._prepared, found)) if isinstance(found, tuple | list) else self._prepared(found)

    def __iter__(self) -> Iterator[type]:
        return iter(self._classes.keys())

    def __len__(self) -> int:
        return len(self._classes)

    def _prepared(self, original: type[PreTrainedModel]) -> type[PreTrainedModel]:
        prepare = self._prepare

        def construct(self: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
            original.__init__(self, *args, **kwargs)
            self.__class__ = original
            prepare(self)

        # transformers identifies a class by its name and module.
        return type(original.__name__, (original,), {"__init__": construct, "__module__": original.__module__})
