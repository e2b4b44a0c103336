import dataclasses
import json
from html.parser import HTMLParser

import pytest

from epo_kernels.train.config import load_config, to_yaml
from epo_kernels.train.data import Episode, Turn
from epo_kernels.train.envs import Observation, Task
from epo_kernels.train.evaluate import Record
from epo_kernels.train.io.report import write_report
from epo_kernels.train.io.tracking import Tracker

VOID = {"meta", "br", "img", "link", "input", "hr"}
HOSTILE = "<script>alert(1)</script> \x1b[31m & [bold]"


class Page(HTMLParser):
    """Checks that elements are closed in order, and collects what the page holds."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.links, self.text = [], [], [], ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href", "xlink:href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def step_metrics(step):
    return {
        "episode/reward/mean": 0.1 * step,
        "episode/reward/std": 0.2,
        "episode/success_rate": 0.5,
        "episode/played": 8,
        "episode/groups": 4,
        "episode/groups_without_variance": 1,
        "actor/entropy": 0.7,
        "epo/entropy_by_turn": [0.5, None, 0.1][: 1 + step],
        "epo/history_by_turn": [0.4, None, 0.01][: 1 + step],
        "epo/band_low_share": 0.0,
        "epo/band_high_share": 0.1,
        "epo/phase_weight": 1.5,
        "epo/penalty": 0.02,
        "actor/pg_clipfrac": 0.01,
        "actor/ppo_kl": 0.001 if step > 1 else float("nan"),
        "actor/grad_norm": 1.0,
        "timing_s/step": 2.0,
        "timing_s/gen_model": 1.0,
        "timing_s/old_log_prob": 0.3,
        "timing_s/update_actor": 0.6,
    }


def record(when, step, successes):
    share = sum(successes) / len(successes)
    scores = [100.0 * success for success in successes]
    return Record(
        when, step, "iid", "sampled", len(successes), 100 * share, share, 0.2, 0.9, 0.75, 9.5, 0, scores, successes
    )


def episodes(count):
    seen = Observation(f"Goal {HOSTILE}", "A hall.", HOSTILE)
    response = f"<think>{HOSTILE}"
    turns = [Turn(seen, [], [1] * 6, [], HOSTILE, 0.5, False, HOSTILE, response, "length")]
    return [
        Episode(Task("walk", n), n, (0, 0, 0, n), turns=turns, score=40.0, finish="max_turns") for n in range(count)
    ]


@pytest.fixture
def finished_run(tmp_path):
    """The folder of a run of three steps, with hostile episodes."""
    tracker = Tracker(tmp_path, 0)
    for step in (1, 2, 3):
        tracker.log(step, step_metrics(step))
    for when, step, successes in (("before", 0, [False] * 12 + [True] * 4), ("after", 3, [False] * 2 + [True] * 14)):
        tracker.log_evaluation([record(when, step, successes)])
        tracker.save_episodes(f"{when}_iid_sampled", episodes(5))
    tracker.close()
    config = load_config("practice", ["loss.band_high=1.1", "watch.entropy_high=0.5", "watch.patience=2"])
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    return tmp_path


def test_the_report_is_one_whole_page(finished_run):
    html = write_report(finished_run).read_text()
    page = Page(html)
    assert page.links == [], "nothing is fetched from anywhere"
    assert "default-src 'none'" in html
    for heading in (
        "Success on the panels",
        "Success in training",
        "Return in training",
        "Entropy by turn",
        "Against its band",
        "Profile and band",
        "Tokens outside the band",
        "Band penalty",
        "Phase weight",
        "Clip fraction",
        "KL",
        "Gradient norm",
        "Time per step",
    ):
        assert heading in page.text
    assert "Success rose by 62.5 points on 16 held-out tasks." in page.text
    assert "a rise" in page.text
    assert "Warning at step 2" in page.text
    assert "entropy 0.70 nats per token is above 0.5 (watch.entropy_high)" in page.text
    assert "band_high: 1.1" in page.text
    assert "torch" in page.text
    assert "nan" not in page.text


def test_cells_of_the_heat_map_lie_where_they_belong(finished_run):
    html = write_report(finished_run).read_text()
    for told in (
        "step 1, turn 1: 0.5 nats",
        "step 3, turn 3: 0.1 nats",
        "step 3, turn 1: above",  # 0.5 against 1.1 of 0.4
        "step 3, turn 3: above",
    ):
        assert f"<title>{told}</title>" in html
    assert "turn 2:" not in html, "nobody got there"


def test_what_a_model_wrote_is_text_and_nothing_else(finished_run):
    html = write_report(finished_run).read_text()
    page = Page(html)
    assert "script" not in page.tags
    assert "<script>alert(1)</script> \\x1b[31m & [bold]" in page.text
    assert "\x1b" not in html
    assert "<think><script>alert(1)</script> \\x1b[31m & [bold]" in page.text, "the response, which was not understood"
    assert "response 6 tokens, truncated" in page.text
    assert "variation 2" in page.text
    assert "variation 3" not in page.text, "three episodes a panel are enough"


def test_an_interval_that_holds_0_is_said_plainly(finished_run):
    path = finished_run / "evaluation.json"
    before, after = json.loads(path.read_text())
    for name in ("success", "successes", "scores", "mean_score"):
        after[name] = before[name]
    path.write_text(json.dumps([before, after]))
    page = Page(write_report(finished_run).read_text())
    assert "No significant change in success: +0.0 points, and the interval includes 0." in page.text
    assert "the interval includes 0, so no change is shown" in page.text


def test_training_tasks_are_not_called_held_out(finished_run):
    path = finished_run / "evaluation.json"
    assert "held-out" in Page(write_report(finished_run).read_text()).text
    records = json.loads(path.read_text())
    path.write_text(json.dumps([one | {"panel": "train"} for one in records]))
    page = Page(write_report(finished_run).read_text())
    assert "training tasks." in page.text
    assert "held-out" not in page.text


def test_a_run_that_has_only_begun_has_a_report_too(tmp_path):
    assert "Nothing trained yet." in Page(write_report(tmp_path).read_text()).text
    (tmp_path / "evaluation.json").write_text(json.dumps([dataclasses.asdict(record("before", 0, [True]))]))
    tracker = Tracker(tmp_path, 0)
    tracker.save_episodes("before_iid_sampled", episodes(1))
    tracker.close()
    page = Page(write_report(tmp_path).read_text())
    assert "before" in page.text
    assert "response 6 tokens, truncated" in page.text
    path = tmp_path / "episodes" / "before_iid_sampled.jsonl"
    old = [json.loads(line) for line in path.read_text().splitlines()]
    for name in ("response", "response_tokens", "finish_reason"):
        del old[0]["turns"][0][name]
    path.write_text(json.dumps(old[0]) + "\n")  # as versions before responses were kept wrote it
    assert "tokens" not in Page(write_report(tmp_path).read_text()).text
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"training/global_step": 1, "actor/entropy": 0.5}) + "\n")
    assert "Training has begun." in Page(write_report(tmp_path).read_text()).text
