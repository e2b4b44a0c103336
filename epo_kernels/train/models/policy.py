"""The policy: a causal LM with its tokenizer, loaded from a folder or the Hub, or built from scratch."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from epo_kernels.train.config import FROM_SCRATCH, ConfigError, ModelConfig
from epo_kernels.train.data import MiniBatch
from epo_kernels.train.envs import Demonstration
from epo_kernels.train.envs.demonstrations import frozen_folder
from epo_kernels.train.io.text import one_line
from epo_kernels.train.models.attention import require_attention
from epo_kernels.train.models.chat import PLAIN_TEMPLATE, THOUGHT, THOUGHT_END, Chat
from epo_kernels.train.models.files import check_config, is_on_hub
from epo_kernels.train.models.gguf import converted, gguf_file
from epo_kernels.train.models.loading import Prepare, load_causal_lm
from epo_kernels.train.models.lora import require_peft, train_adapters_alone

USER, ACT = "<|user|>", "<|act|>"
VOCABULARY = 1000
CHAT_TEMPLATE = (
    f"{{% for message in messages %}}"
    f"{{% if message['role'] == 'assistant' %}}{ACT}{{{{ message['content'] + eos_token }}}}"
    f"{{% else %}}{USER}{{{{ message['content'] }}}}{{% endif %}}{{% endfor %}}"
    f"{{% if add_generation_prompt %}}{ACT}{{% endif %}}"
)


@dataclass
class Policy:
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    chat_settings: dict[str, Any] = field(default_factory=dict)  # variables of the chat template

    @cached_property
    def chat(self) -> Chat:
        """The tokenizer's chat template."""
        return Chat(self.tokenizer, self.chat_settings)

    @property
    def end_ids(self) -> set[int]:
        """Token ids that end a response: the declared ones, and the one used by the chat template."""
        generation = self.model.generation_config
        declared = generation.eos_token_id if generation is not None else None
        ids = set(declared) if isinstance(declared, list) else {declared}
        return {int(i) for i in ids | {self.tokenizer.eos_token_id} | self.chat.end_ids if i is not None}

    @property
    def end_id(self) -> int:
        """The token that ends a response in demonstrations."""
        return self.tokenizer.eos_token_id if self.tokenizer.eos_token_id is not None else min(self.end_ids)

    @property
    def pad_id(self) -> int:
        """Pads batches; always masked, so any id works if the tokenizer defines none."""
        return self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else min(self.end_ids)

    def read(self, responses: Sequence[list[int]]) -> list[str]:
        """Texts of responses, without special tokens except those around a thought."""
        return self.tokenizer.batch_decode([[i for i in ids if i not in self._unread] for ids in responses])

    @cached_property
    def _unread(self) -> set[int]:
        tokens = self.tokenizer.added_tokens_decoder.items()
        return {index for index, token in tokens if token.special and token.content not in (THOUGHT, THOUGHT_END)}

    def full_weights(self) -> dict[str, Tensor]:
        """The weights written by `save` (adapters only, if any), unsharded, on the CPU of rank 0; {} on other ranks.

        All ranks must call it.
        """
        adapted = bool(getattr(self.model, "_hf_peft_config_loaded", False))
        options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=adapted)
        return cast(dict[str, Tensor], get_model_state_dict(self.model, options=options))

    def save(self, folder: Path, weights: dict[str, Tensor] | None = None) -> None:
        """Write the format that `load_policy` reads; `weights` is `full_weights()`, required for sharded models."""
        self.model.save_pretrained(folder, state_dict=weights)
        self.tokenizer.save_pretrained(folder)


def resolve_device(name: str) -> torch.device:
    """Raise ConfigError if the device does not exist."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"model.device must be auto, cpu, cuda or cuda:N, got {name!r}") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"model.device={name}: this machine has {torch.cuda.device_count()} CUDA devices")
    return device


def load_policy(
    source: str,
    config: ModelConfig,
    prepare: Callable[[PreTrainedModel, torch.device], None] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Policy:
    """A policy saved with `save_pretrained`, from the Hub, or from a GGUF file.

    Args:
        source: a folder, Hub id, GGUF file or smollm2: either config.name_or_path, or a policy saved by a run, which
            already has its chat template.
        prepare: called with the model and its target device, before its weights are read (`load_causal_lm`).

    Raises:
        ConfigError: there is no model, or it cannot be trained: custom code, damaged or missing weights, no usable
            chat template, adapters without PEFT, or an attention implementation that cannot run.
    """
    require_peft(config)
    device = resolve_device(config.device)
    require_attention(config, device)
    own = source == config.name_or_path
    try:
        model, tokenizer = _load(
            source, prepare and (lambda model: prepare(model, device)), config.attn_implementation, say
        )
        if own and config.chat_template is not None:
            tokenizer.chat_template = _chosen_template(config.chat_template, tokenizer.chat_template)
        policy = Policy(model, tokenizer, dict(config.chat_template_kwargs))
        _ = policy.chat  # raises if the template is unusable
    except ConfigError as error:
        where = f"model.name_or_path={source}: {error}"
        raise ConfigError(
            where if own else f"{source}: {error} (to continue from another checkpoint: resume=FOLDER)"
        ) from error
    _make_savable(model, tokenizer, say)
    if getattr(model, "_hf_peft_config_loaded", False):
        train_adapters_alone(model)
    _placed(model, device)
    return policy


def _load(
    source: str, prepare: Prepare | None, attn_implementation: str | None, say: Callable[[str], None]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if file := gguf_file(source):
        source = str(converted(file, say))
    is_here = not is_on_hub(source, say)
    with suppress(OSError):  # adapters have no config.json; other errors are reported better by the loaders
        check_config(PreTrainedConfig.get_config_dict(source, local_files_only=is_here)[0])
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=is_here, trust_remote_code=False)
        model = load_causal_lm(
            source, prepare, attn_implementation=attn_implementation, local_files_only=is_here, say=say
        )
        return model, tokenizer
    except ConfigError:
        raise
    except Exception as error:  # reading third-party files may raise anything
        reason = one_line(error)
        if "trust_remote_code" in reason:
            raise ConfigError(
                "it needs custom code (auto_map in its JSON files), which is never run; use a version of the model "
                "in one of transformers' own architectures (often called NAME-hf), or convert it to one"
            ) from error
        if attn_implementation is not None and "attention" in reason.lower():
            raise ConfigError(
                f"it cannot run with model.attn_implementation={attn_implementation} ({reason[:200]}); set it to eager "
                "or null"
            ) from error
        raise ConfigError(
            f"transformers cannot load it ({reason[:300]}); correct its files, or choose another model"
        ) from error


def _chosen_template(choice: str, present: Any) -> str:
    """The text of `model.chat_template`: a builtin, one of the tokenizer's by name, or a file."""
    if choice == "plain":
        return PLAIN_TEMPLATE
    if isinstance(present, dict) and choice in present:
        return present[choice]
    try:
        return Path(choice).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        named = f", or one of the tokenizer's own: {', '.join(present)}" if isinstance(present, dict) else ""
        raise ConfigError(
            f"model.chat_template must be plain or a file with a Jinja template{named}; {choice} cannot be read "
            f"({error})"
        ) from error


def _make_savable(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, say: Callable[[str], None]) -> None:
    """Fix settings that would prevent saving, or make checkpoints require custom code; the driver uses neither."""
    generation = model.generation_config
    if generation is not None and not _is_valid(generation):
        generation.do_sample, change = True, "do_sample=true"  # the intent of a temperature without it
        if not _is_valid(generation):
            ids = {name: getattr(generation, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
            model.generation_config, change = GenerationConfig(**ids), "its token ids only"
        say(f"model: its generation_config.json contradicts itself, so checkpoints are saved with {change}")
    for holder in (vars(model.config), tokenizer.init_kwargs):
        holder.pop("auto_map", None)


def _is_valid(generation: GenerationConfig) -> bool:
    try:
        generation.validate(strict=True)
    except ValueError:
        return False
    return True


def build_from_scratch(demonstrations: Sequence[Demonstration], config: ModelConfig, seed: int) -> Policy:
    """An untrained Qwen2 of size `FROM_SCRATCH`.

    Its tokenizer is the frozen one in `config.warm_start.frozen`, or is trained on the demonstrations' text.
    """
    device = resolve_device(config.device)
    require_attention(config, device)
    if config.warm_start.frozen is None:
        tokenizer = train_tokenizer(demonstrations)
    else:
        tokenizer = _frozen_tokenizer(frozen_folder(config.warm_start.frozen))
    torch.manual_seed(seed)
    settings = FROM_SCRATCH[config.name_or_path] | {"attn_implementation": config.attn_implementation}
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            **settings,
            initializer_range=config.initializer_range,
            num_key_value_heads=2,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    return Policy(_placed(model, device), tokenizer)


def precision(model: PreTrainedModel, dtype: str) -> torch.autocast:
    """Inside the context, matrix products run in `dtype`; the weights stay float32.

    bfloat16 weights have 8 bits of precision: updates below 1/512 of a weight, typical in RL, would be rounded away.
    Casts are not cached, because a cached cast would outlive an update of the weights.
    """
    wanted = getattr(torch, dtype)
    return torch.autocast(model.device.type, wanted, enabled=wanted != torch.float32, cache_enabled=False)


@contextmanager
def casts_kept(model: PreTrainedModel) -> Iterator[None]:
    """Inside the context, `precision` casts each trained weight once instead of in every call. Use between updates.

    On a CPU the casts of a small model cost as much as its products. The results are bit-identical. A sharded model
    keeps none, because it would then be whole on each rank.

    Casts last until the outermost of nested blocks ends. Do not nest a block that needs gradients in one under
    `no_grad`: the casts kept there have no graph.
    """
    if torch.is_autocast_cache_enabled():
        yield
        return
    whole = not any(isinstance(weight, DTensor) for weight in model.parameters())
    torch.set_autocast_cache_enabled(whole)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(False)
        torch.clear_autocast_cache()


def _placed(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """Prepare for sampling and training: dropout is disabled permanently, so that both see the same distribution."""
    # Copied even on the same device: loaded weights are at unaligned addresses in the mapped file, and matrix products
    # round by alignment, so a resumed run would differ in the last bit. `_apply` copies a DTensor's local shard too.
    model._apply(lambda tensor: tensor.to(device, copy=True))
    return model.eval()


def _frozen_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    if not (folder / "tokenizer.json").is_file():
        raise ConfigError(
            f"model.warm_start.frozen: {folder} has no tokenizer.json; save a tokenizer there, or set it to null"
        )
    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def train_tokenizer(demonstrations: Sequence[Demonstration]) -> PreTrainedTokenizerBase:
    """Byte-level BPE, which can encode any text. Uses Qwen2's class, which is what loads a saved Qwen2."""
    texts = (
        text
        for demonstration in demonstrations
        for seen, action in zip(demonstration.observations, demonstration.actions, strict=True)
        for text in (seen.goal, seen.text, seen.scene, f"> {action}", action)
    )
    tokenizer = Qwen2Tokenizer().train_new_from_iterator(
        texts, VOCABULARY, new_special_tokens=[USER, ACT], show_progress=False
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def response_logits(model: PreTrainedModel, batch: MiniBatch) -> Tensor:
    """(B, R, V) logits that predict the batch's response tokens."""
    return model(**_rows(model, batch), use_cache=False).logits.flatten(0, 1)[batch.places]


def response_hidden(decoder: PreTrainedModel, batch: MiniBatch) -> Tensor:
    """(B, R, D) last hidden states that predict the batch's response tokens; `decoder` is `model.get_decoder()`."""
    return decoder(**_rows(decoder, batch), use_cache=False).last_hidden_state.flatten(0, 1)[batch.places]


def _rows(model: PreTrainedModel, batch: MiniBatch) -> dict[str, Tensor]:
    mask = batch.attention_mask
    if mask.dim() == 4 and model.config._attn_implementation == "eager":  # adds the mask to the scores
        mask = torch.zeros_like(mask, dtype=model.dtype).masked_fill(~mask, torch.finfo(model.dtype).min)
    return {"input_ids": batch.input_ids, "attention_mask": mask, "position_ids": batch.position_ids}


@contextmanager
def checkpointing(model: PreTrainedModel, enabled: bool) -> Iterator[None]:
    """Inside the context, layers store only their inputs and recompute the rest in backward, if enabled.

    transformers requires a layer's `training` flag for that. It is set only on the layers, not on their submodules, so
    that dropout stays off; and only inside the context, because checkpointed layers drop the KV cache for generation.
    """
    layers = []
    if enabled:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for layer in layers:
        layer.training = True
    try:
        yield
    finally:
        for layer in layers:
            layer.training = False
