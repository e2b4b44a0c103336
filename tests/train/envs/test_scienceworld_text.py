"""Shortening ScienceWorld's prose, on texts from the simulator."""

import pytest

pytest.importorskip("scienceworld", reason="the scienceworld extra isn't installed")

from epo_kernels.train.envs.base import clean_action
from epo_kernels.train.envs.scienceworld.text import (
    MAX_ANSWER,
    clean_answer,
    clean_goal,
    clean_scene,
    clean_thing,
    is_understood,
)


@pytest.mark.parametrize(
    ("line", "short"),
    [
        ("a substance called soap", "soap"),
        ("a chair. On the chair is: nothing.", "chair"),
        ("a table. On the table is: a glass cup (containing nothing).", "table (glass cup)"),
        ("a fridge. The fridge door is closed. ", "fridge (closed)"),
        ("a oven, which is turned off. The oven door is closed. ", "oven (off) (closed)"),
        ("a sink, which is turned on. In the sink is: a substance called water.", "sink (on) (water)"),
        (
            "a cupboard. The cupboard door is open. In the cupboard is: a ceramic cup (containing nothing), a drawer.",
            "cupboard (open) (ceramic cup, drawer)",
        ),
        ("a thermometer, currently reading a temperature of -10 degrees celsius", "thermometer (-10 degrees celsius)"),
        ("a box (containing a table. On the table is: a cup (containing nothing).)", "box (table (cup))"),
        (
            "a flower pot 2 (containing a apple tree in the reproducing stage. On the apple tree you see: "
            "a red apple, a red apple, a flower. , soil)",
            "flower pot 2 (apple tree in the reproducing stage (flower, red apple x2), soil)",
        ),
        ("a seed jar (containing a pea seed, a apple seed, a pea seed)", "seed jar (apple seed, pea seed x2)"),
        (
            "a desk. On the desk is: a tin cup (containing red paint), a drawer, a tin cup (containing blue paint).",
            "desk (drawer, tin cup (blue paint), tin cup (red paint))",
        ),
        (
            "a red bulb, which is off. its anode is connected to: nothing. its cathode is connected to: nothing. ",
            "red bulb (off)",
        ),
    ],
)
def test_things(line, short):
    assert clean_thing(line) == short


def test_a_scene():
    look = (
        "This room is called the hallway. In it, you see: \n\tthe agent\n\ta substance called air\n\ta picture\n"
        "You also see:\n\tA door to the art studio (that is open)\n\tA door to the kitchen (that is closed)\n"
    )
    assert clean_scene(look, "In your inventory, you see:\n\tan orange\n") == (
        "hallway: picture. Doors: art studio, kitchen (closed). You have: orange."
    )
    outside = "This outside location is called the outside. Here you see: \n\tthe agent\nYou also see:\n"
    assert clean_scene(outside, "In your inventory, you see:\n") == (
        "outside: nothing. Doors: none. You have: nothing."
    )


def test_a_goal_keeps_every_sentence():
    assert clean_goal("Your task is to find a(n) animal.  First, focus on it. Then, move it to the red box.") == (
        "Find a animal. First, focus on it. Then, move it to the red box."
    )


def test_an_ambiguous_request_names_each_different_option_once():
    answer = (
        "Ambiguous request: Please enter the number for the action you intended (or blank to cancel):\n"
        "0:\tmove seed (in jar) to pot\n1:\tmove seed (in jar) to pot\n2:\tmove seed (in pot) to pot\n"
    )
    assert clean_answer(answer) == (
        "Which one? Answer with its number. 0: move seed (in jar) to pot; 2: move seed (in pot) to pot"
    )
    assert is_understood(answer)


def test_answers_are_one_bounded_line():
    assert clean_answer("The recipe reads:\nTo make  salt water") == "The recipe reads: To make salt water"
    assert len(clean_answer("word " * 1000)) == MAX_ANSWER
    assert not is_understood("No known action matches that input.")
    assert not is_understood("Unknown action.  Type 'help' for a list of actions")
    assert is_understood("The door is already open.")


@pytest.mark.parametrize(
    ("action", "sent"),
    [
        (None, ""),
        ("", ""),
        ("go to kitchen\r\nwait", "go to kitchen wait"),
        ("go\x00to\x1b kitchen\x7f", "go to kitchen"),
        ("go \ud800kitchen", "go kitchen"),
        ("x" * 10_000, "x" * 200),
    ],
)
def test_actions_are_harmless_lines(action, sent):
    assert clean_action(action) == sent


def test_a_scene_with_its_animals_alone():
    look = (
        "This outside location is called the outside. Here you see: \n\tthe agent\n\ta substance called air\n\tan axe\n"
        "\ta baby wolf\n\ta fire pit (containing nothing)\n\ta parrot egg\n\ta eggplant\n"
        "You also see:\n\tA door to the kitchen (that is open)\n"
    )
    inventory = "In your inventory, you see:\n\tan orange\n"
    assert clean_scene(look, inventory, "animals") == "outside: baby wolf, parrot egg. Doors: kitchen."
    assert "orange" in clean_scene(look, inventory)
