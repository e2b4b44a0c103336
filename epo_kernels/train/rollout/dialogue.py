"""Prompts for episodes in the form of one growing dialogue, from which one sample per episode is built."""

from collections.abc import Sequence
from dataclasses import dataclass

from epo_kernels.train.config import RolloutConfig
from epo_kernels.train.data import Turn
from epo_kernels.train.envs import Observation
from epo_kernels.train.models.chat import Chat
from epo_kernels.train.rollout.prompts import PromptBuilder, Prompts


@dataclass
class DialogueBuilder:
    """Each prompt extends the previous one by the response as sampled and the environment's answer.

    Token ids are concatenated, never decoded and re-encoded, so that a whole episode can be trained on exactly as the
    engine saw it. If a dialogue exceeds `max_tokens`, a new one starts with a `window` prompt of the goal and the last
    actions.

    Raises:
        ConfigError: the chat template does not write responses unchanged.
    """

    window: PromptBuilder  # for first prompts, and after a dialogue exceeded the limit
    chat: Chat
    max_tokens: int  # prompt limit

    def __post_init__(self) -> None:
        self.chat.require_dialogue()

    def encode(self, states: Sequence[tuple[Observation, Sequence[Turn]]]) -> list[list[int]]:
        """Prompt ids of many (observation, past turns), within the limit.

        Raises:
            PromptTooLong: the goal does not fit.
        """
        prompts = [self._extend(seen, past[-1]) if past else None for seen, past in states]
        begun = [i for i, ids in enumerate(prompts) if ids is None or len(ids) > self.max_tokens]
        for index, ids in zip(begun, self.window.encode([states[i] for i in begun]) if begun else [], strict=True):
            prompts[index] = ids
        return [ids for ids in prompts if ids is not None]

    def _extend(self, seen: Observation, last: Turn) -> list[int]:
        ids = self.chat.after_response("\n".join(self.window.observed(seen)))
        if ids[:1] == last.response_ids[-1:]:  # the policy ended its response like the template would
            ids = ids[1:]
        return last.prompt_ids + last.response_ids + ids


def make_prompts(chat: Chat, config: RolloutConfig) -> Prompts:
    """Prompts by `rollout.layout`: a window of the last actions for each turn, or a growing dialogue.

    Raises:
        ConfigError: see `DialogueBuilder`.
    """
    window = PromptBuilder(
        chat=chat,
        history=config.history,
        history_results=config.history_results,
        max_tokens=config.max_prompt_tokens,
        response_format=config.response_format,
        goal_last=config.goal_last,
        instruction=config.instruction,
        admissible_actions=config.admissible_actions,
    )
    return window if config.layout == "turn" else DialogueBuilder(window, chat, config.max_prompt_tokens)
