"""EntropyHistory against numbers computed by hand."""

import io
import math

import pytest
import torch
import torch.multiprocessing as mp

import epo_kernels as ek
from epo_kernels.metrics import METRIC_NAMES

INF = math.inf
TURNS = torch.tensor([[0, 0, 1], [0, 1, 1]])


def history_of(steps, **settings):
    """A history of 3 turns that committed these steps, each a list of (turn, entropy) tokens."""
    history = ek.EntropyHistory(3, **settings)
    for tokens in steps:
        add(history, tokens)
        history.commit()
    return history


def add(history, tokens):
    turns = torch.tensor([turn for turn, _ in tokens], dtype=torch.int64)
    entropy = torch.tensor([value for _, value in tokens], dtype=torch.float32)
    history.update(turns, entropy, torch.ones_like(turns))


# Turn 0: 3 tokens of mean 2 in the first step, 1 token of 6 in the second. Turn 1: only in the second. Turn 2: never.
STEPS = [[(0, 1.0), (0, 2.0), (0, 3.0)], [(0, 6.0), (1, 4.0), (1, 5.0)]]


@pytest.mark.parametrize(
    ("settings", "means"),
    [
        ({}, [3.0, 4.5, math.nan]),  # 12 / 4
        ({"weighting": "step"}, [4.0, 4.5, math.nan]),  # (2 + 6) / 2; a step without the turn doesn't count
        ({"window": 1}, [6.0, 4.5, math.nan]),
        ({"window": 1, "weighting": "step"}, [6.0, 4.5, math.nan]),
        ({"window": 2}, [3.0, 4.5, math.nan]),
        ({"scope": "global"}, [3.5, 3.5, 3.5]),  # 21 / 6
        ({"scope": "global", "weighting": "step"}, [3.5, 3.5, 3.5]),  # (2 + 5) / 2
        ({"scope": "global", "window": 1}, [5.0, 5.0, 5.0]),
    ],
)
def test_means_by_hand(settings, means):
    history = history_of(STEPS, **settings)
    torch.testing.assert_close(history.means(), torch.tensor(means, dtype=torch.float64), equal_nan=True)
    assert len(history) == 2


def test_token_and_step_weighting_differ_globally_where_steps_differ_in_size():
    steps = [[(0, 1.0)] * 4, [(1, 6.0)]]
    assert history_of(steps, scope="global").means()[2] == 2.0  # 10 / 5
    assert history_of(steps, scope="global", weighting="step").means()[2] == 3.5  # (1 + 6) / 2


def test_a_window_forgets_to_the_last_bit():
    first = history_of([[(0, 1e17)], [(0, 0.1)], [(0, 0.3)]], window=2)
    assert torch.equal(first.means()[0], history_of([[(0, 0.1)], [(0, 0.3)]]).means()[0])
    emptied = history_of([[(0, 1.0)], [(1, 1.0)], []], window=2)
    assert emptied.means()[0].isnan()  # turn 0 left the window: unknown again
    assert len(emptied) == 3


def test_micro_batches_of_a_step_count_together():
    history = ek.EntropyHistory(3, weighting="step")
    for token in STEPS[0]:
        add(history, [token])
    history.commit()
    assert history.means()[0] == 2.0
    assert len(history) == 1


def test_update_moves_no_bound_and_commit_does():
    history = history_of(STEPS[:1])
    before = history.bounds(TURNS, 0.5, 2.0)
    add(history, [(0, 100.0), (2, 100.0)])
    for old, new in zip(before, history.bounds(TURNS, 0.5, 2.0), strict=True):
        assert torch.equal(old, new)
    history.commit()
    assert history.bounds(torch.tensor([0]), 0.5, 2.0)[1] == 2 * 106 / 4


def test_bounds_by_hand():
    lower, upper = history_of(STEPS).bounds(TURNS, 0.5, 2.0)
    assert torch.equal(lower, torch.tensor([[1.5, 1.5, 2.25], [1.5, 2.25, 2.25]]))
    assert torch.equal(upper, torch.tensor([[6.0, 6.0, 9.0], [6.0, 9.0, 9.0]]))
    assert lower.dtype == upper.dtype == torch.float32


@pytest.mark.parametrize("turns", [[2], [-1], [3], [10**12], [-(10**12)]])
@pytest.mark.parametrize(("low", "high"), [(0.0, 2.0), (0.0, INF), (0.0, 0.0), (1.0, 1.0)])
def test_turns_never_seen_and_padding_have_no_band(turns, low, high):
    lower, upper = history_of(STEPS).bounds(torch.tensor(turns), low, high)
    assert (lower.item(), upper.item()) == (-INF, INF)  # never 0 * inf


def test_a_new_history_knows_nothing():
    history = ek.EntropyHistory(3)
    lower, upper = history.bounds(TURNS, 0.0, 2.0)
    assert (lower == -INF).all()
    assert (upper == INF).all()
    assert history.means().isnan().all()
    assert len(history) == 0


@pytest.mark.parametrize("mean", [0.0, 2.0])
def test_an_infinite_high_is_no_upper_bound(mean):
    lower, upper = history_of([[(0, mean)]]).bounds(torch.tensor([0, 1]), 0.5, INF)
    assert (lower.tolist(), upper.tolist()) == ([0.5 * mean, -INF], [INF, INF])  # also at a mean of 0


@pytest.mark.parametrize(("low", "high"), [(-0.1, 2.0), (2.0, 1.0), (INF, INF), (math.nan, 1.0), (0.0, math.nan)])
def test_bounds_out_of_order_are_refused(low, high):
    with pytest.raises(ValueError, match=rf"0 <= low <= high .*, got {low} and {high}"):
        history_of(STEPS).bounds(TURNS, low, high)


@pytest.mark.parametrize("poison", [math.nan, INF, -INF])
def test_masked_tokens_are_never_read(poison):
    history = ek.EntropyHistory(3)
    turns, entropy = torch.tensor([[0, -1, 1]]), torch.tensor([[2.0, poison, poison]], requires_grad=True)
    for mask in (torch.tensor([[1, 0, 0]]), torch.tensor([[True, False, False]]), torch.tensor([[1.0, 0.0, 0.0]])):
        history.update(turns, entropy, mask)
    history.commit()
    assert history.means()[0] == 2.0
    assert history.means()[1].isnan()
    assert not history.means().requires_grad


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([(0, 1.0), (3, 1.0), (-1, 1.0)], r"turns must be in \[0, 3\).*; 2 tokens .*larger num_turns"),
        ([(0, math.nan)], r"entropy must be finite"),
        ([(0, 1.0), (1, INF)], r"entropy must be finite"),
    ],
)
def test_a_commit_that_fails_leaves_the_history_as_it_was(tokens, message):
    history = history_of(STEPS, window=2)
    before = history.means()
    add(history, tokens)
    with pytest.raises(ValueError, match=message):
        history.commit()
    torch.testing.assert_close(history.means(), before, rtol=0, atol=0, equal_nan=True)
    assert len(history) == 2
    add(history, [(2, 7.0)])  # nothing of the bad step is left
    history.commit()
    assert history.means().tolist() == [6.0, 4.5, 7.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_turns": 0}, "num_turns must be an int of at least 1, got 0"),
        ({"num_turns": 3, "window": 0}, "window must be an int of at least 1 step, or None, got 0"),
        ({"num_turns": 3, "scope": "episode"}, "scope must be one of turn, global, got 'episode'"),
        ({"num_turns": 3, "weighting": "none"}, "weighting must be one of token, step, got 'none'"),
    ],
)
def test_settings_out_of_range_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        ek.EntropyHistory(**arguments)


def test_update_names_the_shapes_that_differ():
    with pytest.raises(ValueError, match=r"shape, got \(2, 3\), \(3,\) and \(2, 3\)"):
        ek.EntropyHistory(3).update(TURNS, torch.zeros(3), torch.ones(2, 3))


@pytest.mark.parametrize("settings", [{}, {"window": 2, "weighting": "step"}, {"scope": "global", "window": 1}])
def test_state_goes_round_through_a_file_with_its_open_step(settings):
    history = history_of(STEPS, **settings)
    add(history, [(2, 3.0)])
    file = io.BytesIO()
    torch.save(history.state_dict(), file)
    file.seek(0)
    again = ek.EntropyHistory(3, **settings)
    again.load_state_dict(torch.load(file, weights_only=True))
    for step in ([], [(0, 0.5)], [(1, 0.25), (0, 8.0)]):
        for each in (history, again):
            add(each, step)
            each.commit()
        torch.testing.assert_close(again.means(), history.means(), rtol=0, atol=0, equal_nan=True)
        assert len(again) == len(history)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_defaults_of_torch_change_nothing(device, dtype, monkeypatch):
    """Everything that has no tensor to follow is float32 or float64, and on the CPU."""
    bound_of = {"turns": torch.tensor([[2, 0], [7, -1]]), "low": 0.5, "high": 2.0}
    expected = history_of(STEPS)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    torch.set_default_device(device)
    try:
        history = ek.EntropyHistory(3)
        for step in STEPS:
            turns, values = (torch.tensor(column, device="cpu") for column in zip(*step, strict=True))
            history.update(turns, values.float(), torch.ones_like(turns))
            history.commit()
        history.commit()  # a step without tokens
        again = ek.EntropyHistory(3)
        again.load_state_dict(history.state_dict())
        bounds = again.bounds(**bound_of)
    finally:
        torch.set_default_dtype(before)
        torch.set_default_device(None)
    torch.testing.assert_close(again.means(), expected.means(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(bounds, expected.bounds(**bound_of), rtol=0, atol=0)


def test_a_state_is_a_copy():
    history = history_of(STEPS)
    state = history.state_dict()
    history.update(torch.tensor([0]), torch.tensor([50.0]), torch.tensor([1]))
    history.commit()
    again = ek.EntropyHistory(3)
    again.load_state_dict(state)
    assert again.means()[0] == 3.0


@pytest.mark.parametrize(
    ("settings", "name"),
    [({"window": 4}, "window"), ({"scope": "global"}, "scope"), ({"weighting": "step"}, "weighting")],
)
def test_a_state_of_other_settings_is_refused_by_name(settings, name):
    history = ek.EntropyHistory(3)
    with pytest.raises(ValueError, match=f"{name} must match the saved"):
        history.load_state_dict(ek.EntropyHistory(3, **settings).state_dict())
    with pytest.raises(ValueError, match=r"num_turns must match the saved history.s 4, got 3"):
        history.load_state_dict(ek.EntropyHistory(4).state_dict())


def _rank(rank, file, results):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    history = ek.EntropyHistory(3, weighting="step")
    for step in (STEPS[0][rank:] if rank else STEPS[0][:1], STEPS[1] if rank else []):  # rank 0 has no second step
        if step:
            add(history, step)
        history.commit(group=torch.distributed.group.WORLD)
    metrics = ek.LossMetrics(torch.arange(len(METRIC_NAMES), dtype=torch.float64) + rank).all_reduce()
    add(history, [(5, 1.0)] if rank else [(0, 1.0)])  # only rank 1 is wrong: both must raise
    try:
        history.commit(group=torch.distributed.group.WORLD)
        failed = False
    except ValueError:
        failed = True
    results.put((rank, history.means().tolist(), metrics.values.tolist(), failed))
    torch.distributed.destroy_process_group()


def test_two_processes_share_one_history(tmp_path):
    context = mp.get_context("spawn")
    results = context.Queue()
    ranks = [context.Process(target=_rank, args=(rank, tmp_path / "store", results)) for rank in (0, 1)]
    for process in ranks:
        process.start()
    try:
        got = sorted(results.get(timeout=60) for _ in ranks)
    finally:
        for process in ranks:
            process.join(timeout=10)
            process.kill()
    expected = history_of(STEPS, weighting="step").means().tolist()
    for rank, means, metrics, failed in got:
        assert means[:2] == expected[:2] == [4.0, 4.5], rank
        assert math.isnan(means[2])
        assert metrics == [2.0 * i + 1 for i in range(len(METRIC_NAMES))]
        assert failed


def test_turns_must_be_integers():
    history = ek.EntropyHistory(3)
    turns = torch.tensor([0.5, 1.0])
    with pytest.raises(TypeError, match=r"turns must be integers, got torch\.float32"):
        history.update(turns, torch.ones(2), torch.ones(2))
    with pytest.raises(TypeError, match=r"turns must be integers, got torch\.float32"):
        history.bounds(turns, 0, 2)
