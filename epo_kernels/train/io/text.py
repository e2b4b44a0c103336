"""Makes text from a model or an environment safe to display: it must not control a terminal."""

import unicodedata

_KEPT = "\n\t"
# Control characters, characters that reorder or hide text (bidirectional, zero-width), unassigned ones and surrogates.
_HIDDEN_CATEGORIES = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


def printable(text: str) -> str:
    """The text with invisible characters as escapes, such as \\x1b; line breaks and tabs stay."""
    return "".join(
        character
        if character in _KEPT or unicodedata.category(character) not in _HIDDEN_CATEGORIES
        else character.encode("unicode_escape").decode("ascii")
        for character in text
    )


def one_line(error: object, limit: int | None = None) -> str:
    """An error's message on one line of at most `limit` characters; its type if it has no message."""
    return " ".join(str(error).split())[:limit] or type(error).__name__
