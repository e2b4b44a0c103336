"""The game of test_ray.py: a tool, how a response calls it, and the reward. verl loads this file by its path."""

from __future__ import annotations

import json

from verl.experimental.agent_loop.tool_parser import FunctionCall, ToolParser
from verl.tools.function_tool import function_tool

LETTERS = "abcdefghijklmnopqrstuvwxyz"


@function_tool
def next_letter(letter: str) -> str:
    """Tell which letter follows.

    Args:
        letter: one letter of the alphabet.
    """
    return LETTERS[(LETTERS.index(letter) + 1) % len(LETTERS)]


@ToolParser.register("first_letter")
class FirstLetter(ToolParser):
    """A response that begins with one of the letters a to p, or is empty, calls the tool.

    An untrained model does not write JSON, and the episodes must have several turns.
    """

    async def extract_tool_calls(self, responses_ids, tools=None):
        text = self.tokenizer.decode(responses_ids, skip_special_tokens=True)
        letter = text[:1] or "a"
        if letter not in LETTERS[:16]:
            return text, []
        return text, [FunctionCall(name="next_letter", arguments=json.dumps({"letter": letter}))]


def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    """The share of vowels."""
    return sum(character in "aeiou" for character in solution_str) / max(len(solution_str), 1)
