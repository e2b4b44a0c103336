"""Prompts of an episode as one dialogue that grows: what a sample an episode is made of."""

from collections.abc import Sequence
from dataclasses import dataclass

from epo_kernels.train.config import RolloutConfig
from epo_kernels.train.data import Turn
from epo_kernels.train.envs import Observation
from epo_kernels.train.models.chat import Chat
from epo_kernels.train.rollout.prompts import PromptBuilder, Prompts


@dataclass
class DialogueBuilder:
    """Each prompt is the one before it, the response as sampled, and the environment's answer: the same ids, extended.

    Ids are joined, never decoded and read again, so that a whole episode can be trained on as the engine saw it. Where
    a dialogue outgrows `max_tokens`, another begins with what `window` makes of the goal and the last actions.

    Raises:
        ConfigError: a chat template that doesn't show responses as they are.
    """

    window: PromptBuilder  # of first prompts, and of those after a dialogue that grew too long
    chat: Chat
    max_tokens: int  # of a prompt

    def __post_init__(self) -> None:
        self.chat.require_dialogue()

    def encode(self, states: Sequence[tuple[Observation, Sequence[Turn]]]) -> list[list[int]]:
        """Prompt ids of many (observation, past turns), none longer than the limit.

        Raises:
            PromptTooLong: a goal that doesn't fit.
        """
        prompts = [self._extend(seen, past[-1]) if past else None for seen, past in states]
        begun = [i for i, ids in enumerate(prompts) if ids is None or len(ids) > self.max_tokens]
        for index, ids in zip(begun, self.window.encode([states[i] for i in begun]) if begun else [], strict=True):
            prompts[index] = ids
        return [ids for ids in prompts if ids is not None]

    def _extend(self, seen: Observation, last: Turn) -> list[int]:
        ids = self.chat.after_response("\n".join(self.window.observed(seen)))
        if ids[:1] == last.response_ids[-1:]:  # the policy closed its response as the template would
            ids = ids[1:]
        return last.prompt_ids + last.response_ids + ids


def make_prompts(chat: Chat, config: RolloutConfig) -> Prompts:
    """Prompts by `rollout.layout`: a window of the last actions for each turn, or a dialogue that grows.

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
