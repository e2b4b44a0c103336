"""Shortens ScienceWorld's prose: the same content, with the names used by actions, at half the length."""

import re
from collections import Counter

LOOKED = "You look around."  # replaces the answer to a look that only repeats the scene
MAX_ANSWER = 500  # characters; "objects" and "help" answer with pages
MAX_OPTIONS = 10  # of an ambiguous request

_AMBIGUOUS = "Ambiguous request"
_NOT_UNDERSTOOD = ("No known action matches", "Unknown action", "ERROR")

# In this order: rules may rely on those before them.
_RULES = [
    (re.compile(r"\s+"), " "),
    (re.compile(r"\ban? substance called "), ""),
    (re.compile(r"\. The [\w ]+ door is (open|closed)\."), r" (\1)."),
    (re.compile(r", which is (?:turned )?(\w+)"), r" (\1)"),
    (re.compile(r", currently reading a temperature of (-?\d+ degrees celsius)"), r" (\1)"),
    (re.compile(r"\. (?:On|In) the [^:.()]+: nothing\."), ""),
    (re.compile(r" \(containing nothing\)"), ""),
    (re.compile(r"\(containing "), "("),
    (re.compile(r"\.? ?its [\w ]+ is connected to: nothing\."), ""),
]
_CONTENTS = re.compile(r"\. (?:On|In) the [^:.()]+: ([^.]*?)\.")  # innermost first
_INNERMOST = re.compile(r"\(([^()]*)\)")
_SET_ASIDE = re.compile(r"<(\d+)>")
_ARTICLE = re.compile(r"(^|[(,] ?)(?:[Aa]n?|the) (?=\w)")
_DOOR = re.compile(r"A door to the (.+) \(that is (open|closed)\)")
_ANIMAL = re.compile(r"(baby|juvenile|adult) .+|.+ egg( x\d+)?")
_PLACE = re.compile(r"This .*?is called the (.+?)\. ")


def _list(things: list[str]) -> str:
    """Sorted and counted, because the simulator's order differs from run to run."""
    counts = Counter(sorted(things))
    return ", ".join(thing if count == 1 else f"{thing} x{count}" for thing, count in counts.items())


def _order_contents(line: str) -> str:
    groups: list[str] = []

    def restore(text: str) -> str:
        return _SET_ASIDE.sub(lambda match: groups[int(match[1])], text)

    def set_aside(match: re.Match[str]) -> str:
        groups.append(f"({_list([restore(thing) for thing in match[1].split(', ')])})")
        return f"<{len(groups) - 1}>"

    while _INNERMOST.search(line):
        line = _INNERMOST.sub(set_aside, line)
    return restore(line)


def clean_thing(line: str) -> str:
    """One line of a look-around or inventory: "a table. On the table is: an axe." becomes "table (axe)"."""
    for pattern, replacement in _RULES:
        line = pattern.sub(replacement, line)
    while (shorter := _CONTENTS.sub(r" (\1)", line)) != line:
        line = shorter
    line = _ARTICLE.sub(r"\1", line.strip(" ."))
    return _order_contents(re.sub(r"[. ]+(?=[,)])", "", line))


def is_animal(thing: str) -> bool:
    """Whether a cleaned name is an animal at one of its life stages: "baby wolf", "parrot egg"."""
    return _ANIMAL.fullmatch(thing) is not None


def clean_scene(look: str, inventory: str, shown: str = "full") -> str:
    """The look-around and the inventory in one line.

    Examples: "kitchen: chair, fridge (closed), table (glass cup). Doors: hallway, outside. You have: orange."
    With shown="animals": "outside: baby wolf, parrot egg. Doors: foundry, kitchen."
    """
    place = _PLACE.match(look)
    if place is None:  # not a room: an unknown kind of answer is passed on unchanged
        return clean_answer(look)
    things, doors = [], []
    for line in (line.strip() for line in look.splitlines()[1:]):
        if door := _DOOR.fullmatch(line):
            doors.append(door[1] if door[2] == "open" else f"{door[1]} (closed)")
        elif line not in ("", "the agent", "a substance called air", "You also see:"):
            things.append(clean_thing(line))
    if shown == "animals":
        return f"{place[1]}: {_list([*filter(is_animal, things)]) or 'nothing'}. Doors: {_list(doors) or 'none'}."
    carried = [clean_thing(line) for line in inventory.splitlines()[1:] if line.strip()]
    return (
        f"{place[1]}: {_list(things) or 'nothing'}. Doors: {_list(doors) or 'none'}. "
        f"You have: {_list(carried) or 'nothing'}."
    )


def clean_goal(description: str) -> str:
    """The task description without its opening formula."""
    goal = " ".join(description.split()).removeprefix("Your task is to ").replace("a(n) ", "a ")
    return goal[:1].upper() + goal[1:]


def clean_answer(answer: str) -> str:
    """The answer to an action on one line of at most MAX_ANSWER characters.

    For an ambiguous request, each distinct option is listed once, with the number that selects it.
    """
    if answer.startswith(_AMBIGUOUS):
        options: dict[str, str] = {}
        for line in answer.splitlines()[1:]:
            number, _, option = line.partition(":")
            if option:
                options.setdefault(" ".join(option.split()), number.strip())
        listed = [f"{number}: {option}" for option, number in list(options.items())[:MAX_OPTIONS]]
        answer = "Which one? Answer with its number. " + "; ".join(listed)
    answer = " ".join(answer.split())
    return answer if len(answer) <= MAX_ANSWER else answer[: MAX_ANSWER - 1] + "…"


def is_understood(answer: str) -> bool:
    """Whether the simulator understood the action. An ambiguous request counts as understood."""
    return not answer.startswith(_NOT_UNDERSTOOD)
