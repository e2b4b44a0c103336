"""What the agents of test_ray.py do: a tool, how a response calls it, and the reward. verl loads it by its path."""

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
    """A response whose first character is in the first half of the alphabet asks for the letter after it.

    A model that nobody trained does not write JSON, and turns are what the test is about.
    """

    async def extract_tool_calls(self, responses_ids, tools=None):
        text = self.tokenizer.decode(responses_ids, skip_special_tokens=True)
        calls = []
        if text[:1] in LETTERS[:16]:
            calls = [FunctionCall(name="next_letter", arguments=json.dumps({"letter": text[:1] or "a"}))]
        return text, calls


def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    """The share of vowels."""
    return sum(character in "aeiou" for character in solution_str) / max(len(solution_str), 1)
