"""Prompts of an episode as one dialogue that grows: what a sample an episode is made of."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from epo_kernels.train.config import ConfigError
from epo_kernels.train.data import Turn
from epo_kernels.train.envs import Observation
from epo_kernels.train.policies.prompts import PromptBuilder

_RESPONSE = "=response="  # found again in what the chat template writes


class DialogueBuilder:
    """Each prompt is the one before it, the response as sampled, and the environment's answer: the same ids, extended.

    Ids are joined, never decoded and read again, so that a whole episode can be trained on as the engine saw it. Where
    a dialogue outgrows `max_tokens`, another begins with what `window` makes of the goal and the last actions.

    Args:
        window: of first prompts, and of those after a dialogue that grew too long.
        tokenizer: whose chat template knows the roles user and assistant.
        max_tokens: limit of a prompt.

    Raises:
        ConfigError: a chat template that doesn't show responses as they are.
    """

    def __init__(self, window: PromptBuilder, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> None:
        self._window = window
        self._tokenizer = tokenizer
        self._max_tokens = max_tokens
        self._after_response("")  # refuses the template before anything is played

    def encode(self, states: Sequence[tuple[Observation, Sequence[Turn]]]) -> list[list[int]]:
        """Prompt ids of many (observation, past turns), none longer than the limit.

        Raises:
            PromptTooLong: a goal that doesn't fit.
        """
        prompts = [self._extend(seen, past[-1]) if past else None for seen, past in states]
        begun = [i for i, ids in enumerate(prompts) if ids is None or len(ids) > self._max_tokens]
        for index, ids in zip(begun, self._window.encode([states[i] for i in begun]) if begun else [], strict=True):
            prompts[index] = ids
        return [ids for ids in prompts if ids is not None]

    def _extend(self, seen: Observation, last: Turn) -> list[int]:
        answer = "\n".join(text for text in (seen.text, seen.scene) if text)
        ids = self._tokenizer(self._after_response(answer), add_special_tokens=False)["input_ids"]
        if ids[:1] == last.response_ids[-1:]:  # the policy closed its response as the template would
            ids = ids[1:]
        return last.prompt_ids + last.response_ids + ids

    def _after_response(self, answer: str) -> str:
        """What the chat template writes between two responses: the end of one, the answer, the opening of the other."""
        messages = [
            {"role": "user", "content": "goal"},
            {"role": "assistant", "content": _RESPONSE},
            {"role": "user", "content": answer},
        ]
        rendered = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        _, found, after = str(rendered).partition(_RESPONSE)
        if not found:
            raise ConfigError(
                "rollout.layout=episode: the tokenizer's chat template doesn't write a response as it is; "
                "use rollout.layout=turn, or another model"
            )
        return after
