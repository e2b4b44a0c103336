import io
import json
import re
import time
from dataclasses import replace

import pytest
from rich.console import Console

from epo_kernels.train.config import ConfigError
from epo_kernels.train.data import Episode, Turn
from epo_kernels.train.envs import Observation, Task
from epo_kernels.train.evaluate import Record
from epo_kernels.train.io import display as display_module
from epo_kernels.train.io.display import Display
from epo_kernels.train.io.tracking import Tracker, episode_text, read_episodes, read_evaluation, read_metrics

RECORD = Record("before", 0, "iid", "greedy", 64, 50.0, 0.5, 0.4, 0.6, 0.75, 9.5, 0)


def test_metrics_are_lines_and_a_resumed_run_drops_what_it_makes_again(tmp_path):
    first = Tracker(tmp_path, 0)
    for step in (1, 2, 3):
        first.log(step, {"actor/lr": 0.5**step, "epo/entropy_by_turn": [0.25, None]})
    first.log_evaluation([RECORD, replace(RECORD, when="step 3", step=3)])
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"training/global_step": 4, "actor')  # a kill in the middle of a line
    assert [entry["training/global_step"] for entry in read_metrics(tmp_path)] == [1, 2, 3]

    second = Tracker(tmp_path, 2)
    second.log(3, {"actor/lr": 9.0, "actor/loss": float("nan"), "actor/pg_loss": -float("inf")})
    second.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"training/global_step": 1, "actor/lr": 0.5, "epo/entropy_by_turn": [0.25, None]},
        {"training/global_step": 2, "actor/lr": 0.25, "epo/entropy_by_turn": [0.25, None]},
        {"training/global_step": 3, "actor/lr": 9.0, "actor/loss": None, "actor/pg_loss": None},
    ]
    assert second.records == [RECORD]


@pytest.mark.parametrize("name", ["evaluation.json", "versions.json"])
def test_a_damaged_record_is_named(tmp_path, name):
    tracker = Tracker(tmp_path, 0)
    tracker.log_evaluation([RECORD])
    tracker.close()
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ConfigError, match=rf"{name} is damaged .*; restore it, or remove it"):
        Tracker(tmp_path, 0)


def test_a_rewound_run_keeps_nothing_of_the_steps_it_makes_again(tmp_path):
    first = Tracker(tmp_path, 0)
    first.log_evaluation([RECORD, replace(RECORD, when="step 2", step=2), replace(RECORD, when="after", step=3)])
    for name in ("train_step_00001", "train_step_00003", "before_iid_greedy", "step_2_iid_greedy", "after_iid_greedy"):
        first.save_episodes(name, [])
    first.close()
    Tracker(tmp_path, 2).close()
    kept = {"train_step_00001", "before_iid_greedy", "step_2_iid_greedy"}
    assert {path.stem for path in (tmp_path / "episodes").iterdir()} == kept
    assert [record.when for record in read_evaluation(tmp_path)] == ["before", "step 2"]


def test_tensorboard_holds_the_scalars(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracker = Tracker(tmp_path, 0)
    tracker.log(1, {"actor/lr": 0.5, "epo/entropy_by_turn": [0.25, None]})
    tracker.log_evaluation([RECORD])
    tracker.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {
        "actor/lr",
        "epo/entropy_by_turn/00",
        "evaluation/iid/greedy/mean_score",
        "evaluation/iid/greedy/success",
        "evaluation/iid/greedy/official_success",
    }
    assert events.Scalars("actor/lr")[0].value == 0.5


def test_every_board_gets_scalars_and_is_closed(tmp_path):
    class Board:
        def __init__(self):
            self.added, self.failed = [], None

        def add(self, step, scalars):
            self.added.append((step, dict(scalars)))

        def close(self, failed):
            self.failed = failed

    board = Board()
    tracker = Tracker(tmp_path, 0, board)
    tracker.log(1, {"actor/lr": 0.5, "epo/entropy_by_turn": [0.25, None, 0.75]})
    tracker.log_evaluation([RECORD])
    tracker.close()
    evaluated = {"mean_score": 50.0, "success": 0.5, "official_success": 0.75}
    assert board.added == [
        (1, {"actor/lr": 0.5, "epo/entropy_by_turn/00": 0.25, "epo/entropy_by_turn/02": 0.75}),
        (0, {f"evaluation/iid/greedy/{name}": value for name, value in evaluated.items()}),
    ]
    assert board.failed is False


def test_evaluation_has_the_fields_that_were_promised(tmp_path):
    tracker = Tracker(tmp_path, 0)
    tracker.log_evaluation([RECORD])
    tracker.close()
    (entry,) = json.loads((tmp_path / "evaluation.json").read_text())
    wanted = {"when", "panel", "episodes", "mean_score", "success", "success_low", "success_high", "official_success"}
    assert wanted | {"decoding"} <= set(entry)
    assert read_evaluation(tmp_path) == [RECORD]


def test_an_episode_reads_like_a_story():
    turns = [
        Turn(
            Observation("Find it.", "You enter.", "a hall"),
            [],
            [4, 2],
            [],
            "go left",
            0.5,
            True,
            "",
            "go left\n",
            "stop",
        ),
        Turn(Observation("Find it.", "You walk on.", ""), [], [5], [], "xyzzy", 0.0, False, "", "xyzzy", "stop"),
        Turn(Observation("Find it.", "What?", ""), [], [7] * 6, [], "", 0.0, False, "", "<think>\nI \x1b[1m", "length"),
        Turn(Observation("Find it.", "What?", ""), [], [8, 9], [], "look", 0.0, True, "", "<t>hm</t>look", "stop"),
    ]
    episode = Episode(Task("walk", 7), 0, (0, 0, 0, 0), turns=turns, score=40.0, finish="max_turns")
    assert episode_text(episode) == (
        "# walk, variation 7: score 40, no success, return 0.500, max_turns\n"
        "Find it.\n"
        "You enter.\na hall\n[1] > go left  (+0.500)\n"
        "You walk on.\n[2] > xyzzy  (+0.000, not understood)\n"
        '    response (1 tokens): "xyzzy"\n'
        "What?\n[3] >   (+0.000, not understood)\n"
        '    response (6 tokens, cut at rollout.max_response_tokens): "<think>\\nI \\u001b[1m"\n'
        "What?\n[4] > look  (+0.000)\n"
        '    response (2 tokens): "<t>hm</t>look"'
    )


def test_episodes_as_data_hold_what_the_policy_wrote(tmp_path):
    seen = Observation("Find it.", "You enter.", "a hall")
    turn = Turn(seen, [1], [7] * 6, [0.0] * 6, "", 0.5, False, "What?", "<think>\nI", "length")
    tracker = Tracker(tmp_path, 0)
    tracker.save_episodes("before_iid_greedy", [Episode(Task("walk", 7), 0, (0, 0, 0, 0), turns=[turn])])
    tracker.close()
    (episode,) = read_episodes(tmp_path, "before_iid_greedy")
    assert episode["turns"] == [
        {
            "observation": "You enter.",
            "scene": "a hall",
            "response": "<think>\nI",
            "response_tokens": 6,
            "finish_reason": "length",
            "action": "",
            "reward": 0.5,
            "valid": False,
        }
    ]


def test_without_a_terminal_only_lines_are_shown():
    out = io.StringIO()
    with Display(Console(file=out)) as display, display.bar("rollout", 4) as advance:
        advance(2)
        display.say("step 1/2: [bold] is no markup here")
    display.table([RECORD, replace(RECORD, when="after", step=3, success=0.75)])
    text = out.getvalue()
    assert re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d step 1/2: \[bold\] is no markup here\n", text)
    assert "\x1b" not in text
    assert "50.0% (40.0% to 60.0%)" in text
    assert text.index("before") < text.index("after")


def test_a_log_gets_a_line_of_progress_while_nothing_is_reported(monkeypatch):
    monkeypatch.setattr(display_module, "LOG_EVERY", 0.05)
    out = io.StringIO()
    display = Display(Console(file=out))
    with display.bar("step 3, update", 40, "samples") as update:
        update(0)
        _wait_for(out, " step 3, update: 0 of 40 samples after 0 s\n")
        update(10)
        _wait_for(out, " step 3, update: 10 of 40 samples after 0 s, ")
    assert re.search(r": 10 of 40 samples after \d s, [\d.]+/s, \d s left\n", out.getvalue())
    said = out.getvalue()
    time.sleep(0.12)
    assert out.getvalue() == said, "over is over"


def _wait_for(out, words):
    for _ in range(200):
        if words in out.getvalue():
            return
        time.sleep(0.01)
    raise AssertionError(f"{words!r} did not come: {out.getvalue()}")


def test_a_terminal_gets_bars_without_times(monkeypatch):
    monkeypatch.setattr(display_module, "LOG_EVERY", 0.01)
    out = io.StringIO()
    with Display(Console(file=out, force_terminal=True, width=100)) as display:
        display.say("hello")
        with display.bar("rollout", 4) as update:
            update(1.5)
            time.sleep(0.05)
    assert "hello" in out.getvalue()
    assert "rollout " in out.getvalue()
    assert not re.search(r"\d\d:\d\d:\d\d hello|after \d s", out.getvalue())
