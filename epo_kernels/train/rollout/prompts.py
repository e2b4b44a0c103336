"""Between environment and model: observations to prompt ids, response ids to actions."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from epo_kernels.train.data import Turn
from epo_kernels.train.envs import Observation
from epo_kernels.train.models.chat import THOUGHT, THOUGHT_END, Chat

THINK_ACTION_INSTRUCTION = (
    "You act in a text environment to fulfil the task. Think first, inside <think> </think>, then give exactly one "
    "action inside <action> </action>."
)
REMEMBERED = 1_000_000  # ids of prompts that are kept
_ACTION = re.compile(r"<action>(.*?)</action>", re.DOTALL)


class Prompts(Protocol):
    def encode(self, states: Sequence[tuple[Observation, Sequence[Turn]]]) -> list[list[int]]:
        """Prompt ids of many (observation, past turns), in order."""
        ...


class PromptTooLong(ValueError):
    """Even the goal alone doesn't fit into rollout.max_prompt_tokens."""


def parse_action(response: str, response_format: str) -> str | None:
    """The action in a response; None where it holds none.

    "plain": the first line after a <think> block, if there is one. "think_action": what stands inside the last
    <action> </action>.
    """
    if response_format == "think_action":
        found = _ACTION.findall(response)
        action = found[-1] if found else ""
    else:
        action = without_thought(response).split("\n", 1)[0]
    return " ".join(action.split()) or None


def without_thought(response: str) -> str:
    """What follows a <think> block at the response's start: nothing while the block isn't closed."""
    begun = response.lstrip()
    if not begun.startswith(THOUGHT):
        return response
    return begun.partition(THOUGHT_END)[2].lstrip()


@dataclass
class PromptBuilder:
    """Goal, the last actions and results, what is seen now; as a user's message in the policy's chat template."""

    chat: Chat
    history: int  # past actions shown
    history_results: int  # of those, the latest with the environment's answer; the very last action always has its own
    max_tokens: int  # what is too long loses its oldest actions, then the end of answer and scene; never the goal
    response_format: str  # decides the instruction where none is given
    goal_last: bool = False
    instruction: str | None = None  # the prompt's first line; "" for none
    admissible_actions: bool = False  # list what can be done now, where the environment says so
    _known: dict[str, list[int]] = field(default_factory=dict)  # ids of messages, the latest used last
    _known_ids: int = 0

    def __post_init__(self) -> None:
        if self.instruction is None:
            self.instruction = THINK_ACTION_INSTRUCTION if self.response_format == "think_action" else ""

    def encode(self, states: Sequence[tuple[Observation, Sequence[Turn]]]) -> list[list[int]]:
        """Prompt ids of many (observation, past turns), none longer than the limit.

        Raises:
            PromptTooLong: a goal that doesn't fit.
        """
        prompts = self._look_up([self._message(seen, past, self.history) for seen, past in states])
        return [
            ids if len(ids) <= self.max_tokens else self._shorten(*state)
            for ids, state in zip(prompts, states, strict=True)
        ]

    def observed(self, seen: Observation) -> list[str]:
        """The answer, the scene, and what can be done, as far as there are any."""
        actions = f"You can: {', '.join(seen.actions)}." if self.admissible_actions and seen.actions else ""
        return [text for text in (seen.text, seen.scene, actions) if text]

    def _message(self, seen: Observation, past: Sequence[Turn], history: int, kept: float = 1.0) -> str:
        """What the user says, with at most `history` actions and the first `kept` of each text observed."""
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
        """Ids of the prompts that hold these. Most are known: a group's episodes begin alike, and tasks come back."""
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
                f"the goal alone takes {len(best)} tokens and rollout.max_prompt_tokens is {self.max_tokens}; "
                f"raise it: {seen.goal[:80]!r}"
            )
        low, high = 0.0, 1.0
        for _ in range(8):  # to 1/256 of the text
            middle = (low + high) / 2
            ids = self.chat.prompts([self._message(seen, past, 0, kept=middle)])[0]
            if len(ids) <= self.max_tokens:
                best, low = ids, middle
            else:
                high = middle
        return best
