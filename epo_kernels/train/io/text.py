"""Text that a model or an environment wrote, made fit to be shown: it must not steer a terminal."""

import unicodedata

_KEPT = "\n\t"
# Controls and what reorders or hides text (bidirectional overrides, zero-width marks), unassigned and lone surrogates.
_HIDDEN_CATEGORIES = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


def printable(text: str) -> str:
    """The text with what can't be seen written as escapes, such as \\x1b; line breaks and tabs stay."""
    return "".join(
        character
        if character in _KEPT or unicodedata.category(character) not in _HIDDEN_CATEGORIES
        else character.encode("unicode_escape").decode("ascii")
        for character in text
    )


def one_line(error: object, limit: int | None = None) -> str:
    """What an error says, in one line of at most `limit` characters; its type where it says nothing."""
    return " ".join(str(error).split())[:limit] or type(error).__name__
