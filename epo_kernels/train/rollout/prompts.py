"""Conversion between environment and model: observations to prompt ids, response ids to actions."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from epo_kernels.train.data import Turn
from epo_kernels.train.envs import Observation
from epo_kernels.train.io.failures import PromptTooLong
from epo_kernels.train.models.chat import THOUGHT, THOUGHT_END, Chat

THINK_ACTION_INSTRUCTION = (
    "You act in a text environment to fulfil the task. Think first, inside <think> </think>, then give exactly one "
    "action inside <action> </action>."
)
REMEMBERED = 1_000_000  # token ids of cached prompts
_ACTION = re.compile(r"<action>(.*?)</action>", re.DOTALL)


class Prompts(Protocol):
    def encode(self, states: Sequence[tuple[Observation, Sequence[Turn]]]) -> list[list[int]]:
        """Prompt ids of many (observation, past turns), in order."""
        ...


def parse_action(response: str, response_format: str) -> str | None:
    """The action in a response; None if there is none.

    "plain": the first line after an optional <think> block. "think_action": the content of the last
    <action> </action>.
    """
    if response_format == "think_action":
        found = _ACTION.findall(response)
        action = found[-1] if found else ""
    else:
        action = without_thought(response).split("\n", 1)[0]
    return " ".join(action.split()) or None


def without_thought(response: str) -> str:
    """The text after a <think> block at the start of the response; empty while the block is not closed."""
    begun = response.lstrip()
    if not begun.startswith(THOUGHT):
        return response
    return begun.partition(THOUGHT_END)[2].lstrip()


@dataclass
class PromptBuilder:
    """Goal, recent actions and results, and the current observation, as a user message in the chat template."""

    chat: Chat
    history: int  # past actions shown
    history_results: int  # latest ones shown with the environment's answer; the last action always has its own
    max_tokens: int  # long prompts lose their oldest actions, then the end of answer and scene; never the goal
    response_format: str  # determines the default instruction
    goal_last: bool = False
    instruction: str | None = None  # the prompt's first line; "" for none
    admissible_actions: bool = False  # list the admissible actions, if the environment provides them
    _known: dict[str, list[int]] = field(default_factory=dict)  # ids by message, most recently used last
    _known_ids: int = 0

    def __post_init__(self) -> None:
        if self.instruction is None:
            self.instruction = THINK_ACTION_INSTRUCTION if self.response_format == "think_action" else ""

    def encode(self, states: Sequence[tuple[Observation, Sequence[Turn]]]) -> list[list[int]]:
        """Prompt ids of many (observation, past turns), within the limit.

        Raises:
            PromptTooLong: the goal does not fit.
        """
        prompts = self._look_up([self._message(seen, past, self.history) for seen, past in states])
        return [
            ids if len(ids) <= self.max_tokens else self._shorten(*state)
            for ids, state in zip(prompts, states, strict=True)
        ]

    def observed(self, seen: Observation) -> list[str]:
        """The answer, the scene, and the admissible actions, as far as present."""
        actions = f"You can: {', '.join(seen.actions)}." if self.admissible_actions and seen.actions else ""
        return [text for text in (seen.text, seen.scene, actions) if text]

    def _message(self, seen: Observation, past: Sequence[Turn], history: int, kept: float = 1.0) -> str:
        """The user message with at most `history` actions and the first part (`kept`) of each observed text."""
        lines = [self.instruction] if self.instruction else []
        if not self.goal_last:
            lines.append(seen.goal)
        shown = past[-history:] if history else []
        for age, turn in zip(range(len(shown), 0, -1), shown, strict=True):
            lines.append(f"> {turn.action}")
            if 1 < age <= self.history_results:  # the answer to the latest action is seen.text
                lines.append(turn.result)
        lines += [text[: int(len(text) * kept)] for text in self.observed(seen) if kept]
        if self.goal_last:
            lines.append(seen.goal)
        return "\n".join(lines)

    def _look_up(self, messages: list[str]) -> list[list[int]]:
        """Prompt ids for these messages. Most are cached: a group's episodes start alike, and tasks recur."""
        fresh = [message for message in dict.fromkeys(messages) if message not in self._known]
        for message, ids in zip(fresh, self.chat.prompts(fresh), strict=True):
            self._known[message] = ids
            self._known_ids += len(ids)
        found = []
        for message in messages:
            ids = self._known[message] = self._known.pop(message)
            found.append(list(ids))
        while self._known_ids > REMEMBERED:
            self._known_ids -= len(self._known.pop(next(iter(self._known))))
        return found

    def _shorten(self, seen: Observation, past: Sequence[Turn]) -> list[int]:
        for history in range(min(self.history, len(past)) - 1, -1, -1):
            ids = self.chat.prompts([self._message(seen, past, history)])[0]
            if len(ids) <= self.max_tokens:
                return ids
        best = self.chat.prompts([self._message(seen, past, 0, kept=0.0)])[0]
        if len(best) > self.max_tokens:
            raise PromptTooLong(
                f"rollout.max_prompt_tokens must be at least {len(best)}, the length of the goal alone, got "
                f"{self.max_tokens}; raise it: {seen.goal[:80]!r}"
            )
        low, high = 0.0, 1.0
        for _ in range(8):  # bisect to 1/256 of the text
            middle = (low + high) / 2
            ids = self.chat.prompts([self._message(seen, past, 0, kept=middle)])[0]
            if len(ids) <= self.max_tokens:
                best, low = ids, middle
            else:
                high = middle
        return best
