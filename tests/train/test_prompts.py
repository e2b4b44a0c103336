import pytest

from epo_kernels.train.data import Turn
from epo_kernels.train.envs import Observation
from epo_kernels.train.io.failures import PromptTooLong
from epo_kernels.train.rollout import prompts
from epo_kernels.train.rollout.dialogue import DialogueBuilder
from epo_kernels.train.rollout.prompts import PromptBuilder, parse_action
from tests.train.conftest import prompts_of

GOAL = "Follow the signs through 4 rooms to the vault."


def state(turns=8, scene="Sign: moon, by day. " * 30):
    past = [
        Turn(Observation(GOAL, ""), [], [], [], f"go way{n}", result=f"answer {n}" + " very long" * 20)
        for n in range(turns)
    ]
    return Observation(GOAL, past[-1].result if past else "You enter.", scene), past


@pytest.mark.parametrize("goal_last", [False, True])
@pytest.mark.parametrize("limit", [20, 30, 40, 60, 100, 200, 400, 2000])
def test_the_goal_is_never_cut_and_the_limit_holds(cloned, limit, goal_last):
    builder = PromptBuilder(cloned.chat, 6, 3, limit, "plain", goal_last)
    goal_tokens = len(cloned.tokenizer(f"<|user|>{GOAL}<|act|>")["input_ids"])
    if goal_tokens > limit:
        with pytest.raises(PromptTooLong, match=r"rollout\.max_prompt_tokens must be"):
            builder.encode([state()])
        return
    for ids in builder.encode([state(), state(0), state(2, scene="")]):
        assert len(ids) <= limit
        text = cloned.tokenizer.decode(ids)
        assert GOAL in text
        assert text.startswith("<|user|>")
        assert text.endswith("<|act|>")


@pytest.mark.parametrize("goal_last", [False, True])
def test_what_a_prompt_shows(cloned, goal_last):
    builder = PromptBuilder(cloned.chat, 3, 2, 4000, "plain", goal_last)
    (ids,) = builder.encode([state(5, scene="the scene")])
    lines = cloned.tokenizer.decode(ids).removeprefix("<|user|>").removesuffix("<|act|>").split("\n")
    seen = ["> go way2", "> go way3", "answer 3 v", "> go way4", "answer 4 v", "the scene"]
    assert [line[:10] for line in lines] == ([*seen, GOAL[:10]] if goal_last else [GOAL[:10], *seen])


def test_the_oldest_actions_go_first(cloned):
    builder = PromptBuilder(cloned.chat, 6, 0, 220, "plain")
    (ids,) = builder.encode([state(6, scene="the scene" + " moon" * 60)])
    shown = cloned.tokenizer.decode(ids)
    kept = [n for n in range(6) if f"> go way{n}\n" in shown]
    assert kept == list(range(6 - len(kept), 6))
    assert "the scene" in shown


def test_prompts_do_not_depend_on_their_company(cloned):
    builder = prompts_of(cloned, max_tokens=50)
    states = [state(), state(0), state(3, scene="x")]
    assert builder.encode(states) == [builder.encode([one])[0] for one in states]


def test_what_is_remembered_of_prompts(cloned, monkeypatch):
    states = [state(0, scene=f"scene {n % 5}") for n in range(10)]
    wanted = [prompts_of(cloned).encode([one])[0] for one in states]
    monkeypatch.setattr(prompts, "REMEMBERED", 3 * len(wanted[0]))
    builder = prompts_of(cloned)
    found = builder.encode(states)
    assert found == wanted
    found[0].clear()  # whose list it is
    assert builder.encode(states[3:] + states[:3]) == wanted[3:] + wanted[:3]
    assert [message[-1] for message in builder._known] == ["0", "1", "2"], "the latest used"


def test_the_instruction_comes_with_its_format(cloned):
    (ids,) = PromptBuilder(cloned.chat, 0, 0, 4000, "think_action").encode([state(0)])
    assert "<action>" in cloned.tokenizer.decode(ids)


def test_an_instruction_of_ones_own_comes_first(cloned):
    for response_format in ("plain", "think_action"):
        builder = PromptBuilder(cloned.chat, 0, 0, 4000, response_format, instruction="Be brief.")
        assert cloned.tokenizer.decode(builder.encode([state(0)])[0]).startswith(f"<|user|>Be brief.\n{GOAL}")
    (ids,) = PromptBuilder(cloned.chat, 0, 0, 4000, "think_action", instruction="").encode([state(0)])
    assert cloned.tokenizer.decode(ids).startswith(f"<|user|>{GOAL}")


@pytest.mark.parametrize("admissible_actions", [False, True])
def test_admissible_actions_are_listed_where_asked_for(cloned, suite, admissible_actions):
    seen = suite.make().reset(suite.tasks("train")[0])
    builder = PromptBuilder(cloned.chat, 0, 0, 4000, "plain", admissible_actions=admissible_actions)
    dialogue = DialogueBuilder(builder, cloned.chat, 4000)
    past = [Turn(seen, [1], [2], [], "go left")]
    for ids in (builder.encode([(seen, [])])[0], dialogue.encode([(seen, past)])[0]):
        listed = "\nYou can: go left, go right, go ahead.<|act|>" in cloned.tokenizer.decode(ids)
        assert listed == admissible_actions


@pytest.mark.parametrize(
    ("response", "response_format", "action"),
    [
        ("go left", "plain", "go left"),
        ("  go   left \nand then right", "plain", "go left"),
        ("", "plain", None),
        ("\ngo left", "plain", None),
        ("<think>\nleft or\nright\n</think>\n\ngo left\nand", "plain", "go left"),
        ("<think>\n\n</think>\n\ngo left", "plain", "go left"),
        ("<think>left or", "plain", None),
        ("<think>left</think>", "plain", None),
        ("<think>hm</think><action> go\nleft </action>", "think_action", "go left"),
        ("<action>one</action><action>two</action>", "think_action", "two"),
        ("<action>go left", "think_action", None),
        ("go left", "think_action", None),
        ("<action></action>", "think_action", None),
    ],
)
def test_parsing(response, response_format, action):
    assert parse_action(response, response_format) == action
