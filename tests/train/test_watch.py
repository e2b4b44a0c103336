import pytest

from epo_kernels.train.config import WatchConfig
from epo_kernels.train.io.watch import CollapseWatch, repeated_share, watched

FINE = {
    "actor/entropy": 0.5,
    "episode/groups": 4,
    "episode/groups_without_variance": 1,
    "response/repeated_token_share": 0.0,
    "episode/valid_action_ratio": 0.1,
}


@pytest.mark.parametrize(
    ("metrics", "sign", "figure"),
    [
        ({"actor/entropy": 0.001}, "entropy_low", "entropy 0.0010 nats per token is below 0.005 (watch.entropy_low)"),
        ({"actor/entropy": 5.0}, "entropy_high", "entropy 5.00 nats per token is above 4 (watch.entropy_high)"),
        ({"episode/groups_without_variance": 4}, "uniform_groups", "100% of groups have equal returns"),
        ({"response/repeated_token_share": 0.5}, "repeated_tokens", "50% of response tokens repeat earlier ones"),
        (
            {"episode/valid_action_ratio": 0.02, "response_length/clip_ratio": 0.75},
            "valid_actions",
            "the environment understood 2.0% of actions, below 10% (watch.valid_actions), and 75% of responses were",
        ),
    ],
)
def test_a_sign_that_stays_is_told_once_with_its_figure(metrics, sign, figure):
    watch = CollapseWatch(WatchConfig(patience=2))
    assert watch.observe(1, FINE) == []
    assert watch.observe(2, FINE | metrics) == []
    (alarm,) = watch.observe(3, FINE | metrics)
    assert (alarm.step, alarm.sign) == (3, sign)
    assert alarm.text.startswith(figure)
    assert watch.observe(4, FINE | metrics) == []
    assert watch.observe(5, FINE) == []
    assert watch.observe(6, FINE | metrics) == []
    assert [a.sign for a in watch.observe(7, FINE | metrics)] == [sign], "a spell of its own"


def test_what_was_not_measured_is_no_sign():
    assert CollapseWatch(WatchConfig(patience=1)).observe(1, {"actor/entropy": None, "episode/groups": 0}) == []


def test_a_resumed_watch_knows_the_spell():
    low = {"actor/entropy": 0.0}
    lines = [{"training/global_step": step, **FINE, **low} for step in (1, 2)]
    watch, alarms = watched(lines, WatchConfig(patience=3))
    assert alarms == []
    assert [alarm.step for alarm in watch.observe(3, FINE | low)] == [3]


def test_repeated_tokens():
    assert repeated_share([[1, 2, 3, 4, 5, 6]]) == 0.0
    assert repeated_share([[7] * 10]) == pytest.approx(7 / 10)  # from the fourth token on
    assert repeated_share([[1, 2] * 5]) == pytest.approx(6 / 10)  # 121, 212, then again
    assert repeated_share([[1, 2, 3], [1, 2, 3]]) == 0.0, "two responses may be alike"
    assert repeated_share([]) == 0.0
