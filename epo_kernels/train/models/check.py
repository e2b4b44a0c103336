"""Checks a model right after loading, so that unusable ones are rejected before any episode is played."""

from tempfile import TemporaryDirectory

import torch
from torch import Tensor
from transformers import PreTrainedModel

from epo_kernels.train.config import ConfigError, RolloutConfig, TrainConfig
from epo_kernels.train.data import MiniBatch, Sample
from epo_kernels.train.io.text import one_line
from epo_kernels.train.models.policy import Policy, precision, response_hidden, response_logits

THOUGHT_TOKENS = 128  # a realistic length of a thought
_TOLERANCE = 1e-3  # of the largest logit: float32 products of other shapes round differently
_TOLERANCE_16_BIT = 3e-2  # the same, in bfloat16


def check_policy(policy: Policy, config: TrainConfig) -> list[str]:
    """Check a policy against the requirements of a run. Returns warnings.

    Raises:
        ConfigError: the message says what is unsuitable and what to change.
    """
    _check_tokens(policy)
    _check_positions(policy, config.rollout)
    if config.rollout.layout == "episode":
        policy.chat.require_dialogue()
    with _precision_of_checks(policy.model):
        _check_scoring(policy)
        if config.rollout.engine == "transformers":
            _check_cache(policy)
    _check_saving(policy)
    warnings = _check_thinking(policy, config)
    if policy.chat.writes_date:
        warnings.append(
            "its chat template writes today's date, so a run resumed tomorrow has different prompts; set "
            "model.chat_template_kwargs.date_string if the template supports it"
        )
    return warnings


def _check_tokens(policy: Policy) -> None:
    rows = _embedding_rows(policy.model)
    beyond = [token for token, index in policy.tokenizer.get_vocab().items() if index >= rows]
    # Special tokens that the chat template does not write never occur; some models have no embedding row for them.
    special = {token.content for token in policy.tokenizer.added_tokens_decoder.values() if token.special}
    if found := [token for token in beyond if token not in special - policy.chat.control_tokens]:
        raise ConfigError(
            f"its embedding has {rows} rows, too few for its tokenizer ({len(policy.tokenizer)} tokens, among them "
            f"{found[0]!r}); save the model again after model.resize_token_embeddings(len(tokenizer)), or take the "
            "tokenizer that belongs to it"
        )
    if not policy.end_ids:
        raise ConfigError(
            "neither its tokenizer, its generation_config.json nor its chat template names an end token, so responses "
            "would never end; set eos_token in tokenizer_config.json"
        )
    if max(policy.end_ids) >= rows:
        raise ConfigError(
            f"its end token has id {max(policy.end_ids)} and its embedding {rows} rows; correct eos_token_id in "
            "generation_config.json"
        )


def _check_positions(policy: Policy, rollout: RolloutConfig) -> None:
    positions = getattr(policy.model.config.get_text_config(), "max_position_embeddings", None)
    longest = rollout.max_prompt_tokens + rollout.max_response_tokens
    if positions is not None and longest > positions:
        raise ConfigError(
            f"rollout.max_prompt_tokens + rollout.max_response_tokens is {longest} and the model has {positions} "
            "positions (max_position_embeddings in its config.json); lower rollout.max_prompt_tokens"
        )


@torch.no_grad()
def _check_scoring(policy: Policy) -> None:
    """Logits in a padded batch must equal those of each sequence alone, and never depend on later tokens."""
    model, (first, second) = policy.model, _sequences(policy)
    samples = [Sample.of_turn(first[:4], first[4:], 0), Sample.of_turn(second[:1], second[1:], 0)]
    try:
        padded = response_logits(model, _batch(policy, samples, None)).float()
        whole = [_logits(model, ids) for ids in (first, second)]
        early = _logits(model, first[:5])
    except Exception as error:  # from any architecture's code
        raise _cannot(model, f"fails on a batch of two sequences ({_reason(error)})", False) from error
    if not all(logits.isfinite().all() for logits in whole):
        raise ConfigError("its logits are not finite; export or download the model again")
    if not _agree(whole[0][: len(early)], early):
        raise _cannot(model, "lets tokens attend to later ones, so it cannot generate", False)
    pairs = [(padded[0, : len(first) - 4], whole[0][3:-1]), (padded[1, : len(second) - 1], whole[1][:-1])]
    if not all(_agree(*pair) for pair in pairs):
        raise _cannot(model, "computes different logits in a padded batch than alone", False)


@torch.no_grad()
def _check_cache(policy: Policy) -> None:
    """Repeats the engine's use of the cache (padded prompts, shared and dropped rows) and compares with no cache."""
    model, (first, second) = policy.model, _sequences(policy)
    prompts = [first[:-1], second[:-1]]
    width = len(prompts[0])
    padding = width - len(prompts[1])
    ids = torch.tensor([prompts[0], [policy.pad_id] * padding + prompts[1]], device=model.device)
    seen = torch.tensor([[1] * width, [0] * padding + [1] * len(prompts[1])], device=model.device)
    position = (seen.cumsum(1) - 1).clamp(min=0)
    try:
        settings = {"use_cache": True, "logits_to_keep": 1}
        cache = model(input_ids=ids, attention_mask=seen, position_ids=position, **settings).past_key_values
        for rows in ([1, 0, 1], [0, 1]):  # afterwards the second sequence comes first
            cache.batch_select_indices(torch.tensor(rows, device=model.device))
        written = model(
            input_ids=torch.tensor([[second[-1]], [first[-1]]], device=model.device),
            attention_mask=torch.cat([seen.flip(0), seen.new_ones(2, 1)], dim=1),
            position_ids=position.flip(0)[:, -1:] + 1,
            past_key_values=cache,
            **settings,
        ).logits[:, -1]
    except Exception as error:  # from any architecture's code
        raise _cannot(model, f"cannot be sampled from in batches ({_reason(error)})", True) from error
    for logits, sequence in zip(written, (second, first), strict=True):
        if not _agree(logits.float(), _logits(model, sequence)[-1]):
            raise _cannot(model, "computes different logits with its cache than without", True)


@torch.no_grad()
def row_width_of(policy: Policy, config: TrainConfig) -> int | None:
    """Width in tokens of the packed rows used for training; None: the model cannot be trained on packed rows.

    Packed rows need a custom attention mask. Sliding windows would count tokens of other sequences, and some
    architectures accept no mask: such models are trained with one row per sample.
    """
    width = config.rollout.max_prompt_tokens + config.rollout.max_response_tokens
    decoder = policy.model.get_decoder()
    settings = policy.model.config.get_text_config()
    windows = [getattr(settings, name, None) for name in ("sliding_window", "attention_chunk_size")]
    if not config.optim.packing or any(window and window < width for window in windows):
        return None
    if decoder.config._attn_implementation not in ("sdpa", "eager"):
        return None
    first, second = _sequences(policy)
    samples = [
        Sample.of_turn(prompt, response, 0)
        for prompt, response in ((first[:3], first[3:]), (first[:3], second), (second[:2], second[2:]))
    ]
    try:
        packed = response_hidden(decoder, _batch(policy, samples, width))
        alone = [response_hidden(decoder, _batch(policy, [sample], None))[0] for sample in samples]
    except Exception:  # from any architecture's code
        return None
    agrees = all(_agree(row[: len(own)].float(), own.float()) for row, own in zip(packed, alone, strict=True))
    return width if agrees else None


def _batch(policy: Policy, samples: list[Sample], row_width: int | None) -> MiniBatch:
    return MiniBatch.of(samples, policy.pad_id, policy.model.device, row_width)


def _check_saving(policy: Policy) -> None:
    """Check that everything in a checkpoint besides the weights can be saved."""
    try:
        with TemporaryDirectory() as folder:
            policy.model.config.save_pretrained(folder)
            if policy.model.generation_config is not None:
                policy.model.generation_config.save_pretrained(folder)
            policy.tokenizer.save_pretrained(folder)
    except Exception as error:  # transformers validates contents in many ways
        raise ConfigError(f"it cannot be saved as a checkpoint ({_reason(error)}); correct its JSON files") from error


def _check_thinking(policy: Policy, config: TrainConfig) -> list[str]:
    if config.rollout.response_format != "plain":
        return []
    switch = "set model.chat_template_kwargs.enable_thinking=false"
    if policy.chat.opening and config.model.warm_start.demonstrations:
        raise ConfigError(
            "its chat template begins every response with <think>, and model.warm_start clones bare actions; "
            f"{switch} if the template supports it, or model.warm_start.demonstrations=0"
        )
    if policy.chat.may_think and config.rollout.max_response_tokens < THOUGHT_TOKENS:
        return [
            "this model may think before it acts, but rollout.max_response_tokens="
            f"{config.rollout.max_response_tokens} leaves no room for that; {switch}, or raise the limit"
        ]
    return []


def _sequences(policy: Policy) -> tuple[list[int], list[int]]:
    """Two sequences of different lengths, of tokens in every vocabulary."""
    size = _embedding_rows(policy.model)
    ids = [index % size for index in range(3, 40) if index % size != policy.pad_id]
    return ids[:7], ids[2:6]


def _embedding_rows(model: PreTrainedModel) -> int:
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    return weight.shape[0]


def _logits(model: PreTrainedModel, ids: list[int]) -> Tensor:
    """(T, V) float32, of a single sequence."""
    return model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits[0].float()


def _precision_of_checks(model: PreTrainedModel) -> torch.autocast:
    """float32, except that flash attention accepts only 16-bit inputs."""
    is_flash = (model.config._attn_implementation or "").startswith("flash")
    return precision(model, "bfloat16" if is_flash else "float32")


def _agree(found: Tensor, wanted: Tensor) -> bool:
    tolerance = _TOLERANCE_16_BIT if torch.is_autocast_enabled(found.device.type) else _TOLERANCE
    return torch.allclose(found, wanted, rtol=0, atol=tolerance * float(wanted.abs().max()))


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {one_line(error, 200)}"


def _cannot(model: PreTrainedModel, what: str, engine_alone: bool) -> ConfigError:
    cure = "set rollout.engine=vllm, or choose" if engine_alone else "choose"
    return ConfigError(f"{type(model).__name__} {what}; {cure} another model in model.name_or_path")
