"""The policy: a causal LM with its tokenizer, loaded from a folder or the hub, or built from scratch."""

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
        """Token ids that end a response: those declared, and what the chat template ends one with."""
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
        """Fills batches up; always masked, so any id will do where the tokenizer names none."""
        return self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else min(self.end_ids)

    def read(self, responses: Sequence[list[int]]) -> list[str]:
        """Texts of responses, without special tokens other than those around a thought."""
        return self.tokenizer.batch_decode([[i for i in ids if i not in self._unread] for ids in responses])

    @cached_property
    def _unread(self) -> set[int]:
        tokens = self.tokenizer.added_tokens_decoder.items()
        return {index for index, token in tokens if token.special and token.content not in (THOUGHT, THOUGHT_END)}

    def full_weights(self) -> dict[str, Tensor]:
        """What `save` writes (with adapters, these alone), unsharded, on the CPU of the first rank; {} on the others.

        All ranks must call it.
        """
        adapted = bool(getattr(self.model, "_hf_peft_config_loaded", False))
        options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=adapted)
        return cast(dict[str, Tensor], get_model_state_dict(self.model, options=options))

    def save(self, folder: Path, weights: dict[str, Tensor] | None = None) -> None:
        """Write the format that `load_policy` reads; `weights` (`full_weights`) of a model that is split over ranks."""
        self.model.save_pretrained(folder, state_dict=weights)
        self.tokenizer.save_pretrained(folder)


def resolve_device(name: str) -> torch.device:
    """Raises ConfigError where the device isn't there."""
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
    """A policy saved with `save_pretrained`, from the hub, or of a GGUF file.

    Args:
        source: a folder, hub id, GGUF file or smollm2: config.name_or_path, or what a run saved, which has its chat
            template already.
        prepare: called with the model and the device it is for, before its weights are read (`load_causal_lm`).

    Raises:
        ConfigError: nothing to load there, or nothing that can be trained: code of its own, damaged or missing weights,
            no usable chat template, adapters without PEFT, or an attention implementation that can't run.
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
        _ = policy.chat  # refuses a template that can't be used
    except ConfigError as error:
        where = f"model.name_or_path={source}: {error}"
        raise ConfigError(
            where if own else f"{source}: {error} (to go on from another checkpoint: resume=FOLDER)"
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
    with suppress(OSError):  # adapters have no config.json, and whatever else it is, the loaders say it better
        check_config(PreTrainedConfig.get_config_dict(source, local_files_only=is_here)[0])
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=is_here, trust_remote_code=False)
        model = load_causal_lm(
            source, prepare, attn_implementation=attn_implementation, local_files_only=is_here, say=say
        )
        return model, tokenizer
    except ConfigError:
        raise
    except Exception as error:  # whatever reading someone's files may raise
        reason = one_line(error)
        if "trust_remote_code" in reason:
            raise ConfigError(
                "it needs code of its own (auto_map in its JSON files), which is never run; use a version of the model "
                "in one of transformers' own architectures (often called NAME-hf), or convert it to one"
            ) from error
        if attn_implementation is not None and "attention" in reason.lower():
            raise ConfigError(
                f"it can't run with model.attn_implementation={attn_implementation} ({reason[:200]}); set it to eager "
                "or null"
            ) from error
        raise ConfigError(
            f"transformers can't load it ({reason[:300]}); correct its files, or choose another model"
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
            f"model.chat_template must be plain or a file with a Jinja template{named}; {choice} can't be read "
            f"({error})"
        ) from error


def _make_savable(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, say: Callable[[str], None]) -> None:
    """Change what would break a checkpoint, or ask its readers to run code; the driver itself uses none of it."""
    generation = model.generation_config
    if generation is not None and not _is_valid(generation):
        generation.do_sample, change = True, "do_sample=true"  # as a temperature without it was meant
        if not _is_valid(generation):
            ids = {name: getattr(generation, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
            model.generation_config, change = GenerationConfig(**ids), "its token ids alone"
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
    """A Qwen2 of `FROM_SCRATCH` that knows nothing yet.

    Its tokenizer is the frozen one of `config.warm_start.frozen`, or trained on the demonstrations' text.
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
    """Inside, matrix products run in `dtype`; the weights stay float32.

    A weight in bfloat16 has 8 bits: an update below 1/512 of it would be rounded away, and those of RL are. Casts are
    not cached, since a cached one would outlive an update of the weights.
    """
    wanted = getattr(torch, dtype)
    return torch.autocast(model.device.type, wanted, enabled=wanted != torch.float32, cache_enabled=False)


@contextmanager
def casts_kept(model: PreTrainedModel) -> Iterator[None]:
    """Inside, `precision` casts each trained weight once and not in every call: for passes between two updates.

    On a CPU the casts of a small model cost as much as its products. The results are the same to the last bit. A model
    that is split over ranks keeps none, since it would then be whole on each of them.

    Casts last until the outermost of nested blocks ends. Never nest a block that needs gradients in one that doesn't
    track them: the casts kept there have no graph.
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
    """Ready for sampling and training: without dropout, for good, since both must see one distribution."""
    # A copy even on the same device: loaded weights lie in the mapped file at odd addresses, and matrix products round
    # by alignment, so a resumed run would differ in the last bit. `_apply` copies a DTensor's local shard too.
    model._apply(lambda tensor: tensor.to(device, copy=True))
    return model.eval()


def _frozen_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    if not (folder / "tokenizer.json").is_file():
        raise ConfigError(
            f"model.warm_start.frozen: {folder} has no tokenizer.json; save a tokenizer there, or set it to null"
        )
    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def train_tokenizer(demonstrations: Sequence[Demonstration]) -> PreTrainedTokenizerBase:
    """Byte-level BPE: any text can be encoded. Qwen2's class, since that is what loads a saved Qwen2 again."""
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
    if mask.dim() == 4 and model.config._attn_implementation == "eager":  # which adds the mask to the scores
        mask = torch.zeros_like(mask, dtype=model.dtype).masked_fill(~mask, torch.finfo(model.dtype).min)
    return {"input_ids": batch.input_ids, "attention_mask": mask, "position_ids": batch.position_ids}


@contextmanager
def checkpointing(model: PreTrainedModel, enabled: bool) -> Iterator[None]:
    """Inside, layers keep their inputs alone and compute the rest again in backward, where enabled.

    transformers asks a layer's `training` for that. It is set on the layers alone, not on what they hold, so that
    dropout stays off; and inside alone, since checkpointed layers drop the KV cache that generation needs.
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
