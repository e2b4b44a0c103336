import json
from dataclasses import replace
from html.parser import HTMLParser

from epo_kernels.train.report import write_report
from epo_kernels.train.tracking import Tracker
from tests.train.test_tracking import RECORD

VOID = {"meta", "br", "img", "link", "input", "hr"}


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
        "episode/success_rate": 0.5,
        "actor/entropy": 0.7,
        "epo/entropy_by_turn": [0.5, None, 0.1][: 1 + step],
        "epo/band_low_share": 0.0,
        "epo/band_high_share": 0.1,
        "epo/phase_weight": 1.5,
        "actor/pg_clipfrac": 0.01,
        "actor/ppo_kl": 0.001 if step > 1 else float("nan"),
        "timing_s/gen": 1.0,
        "timing_s/old_log_prob": 0.3,
        "timing_s/update_actor": 0.6,
    }


def test_the_report_is_one_whole_page(tmp_path):
    tracker = Tracker(tmp_path, 0)
    for step in (1, 2, 3):
        tracker.log(step, step_metrics(step))
    tracker.log_evaluation([RECORD, replace(RECORD, when="after", step=3, success=0.625)])
    tracker.close()
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    hostile = "\n\n# ".join(["# walk: score 1", "second <script>alert(1)</script>", "third"])
    (tmp_path / "episodes" / "before_iid_greedy.txt").write_text(hostile)

    page = Page(write_report(tmp_path).read_text())
    assert "script" not in page.tags
    assert page.tags.count("svg") == 7
    assert all(link.startswith(("#", "data:")) for link in page.links)  # nothing is fetched from anywhere
    assert "62.5 %" in page.text
    assert "second <script>alert(1)</script>" in page.text
    assert "third" not in page.text  # two episodes a panel are enough
    assert "seed: 0" in page.text


def test_a_run_that_has_only_begun_has_a_report_too(tmp_path):
    (tmp_path / "evaluation.json").write_text(json.dumps([RECORD.__dict__]))
    page = Page(write_report(tmp_path).read_text())
    assert "before" in page.text
    assert "svg" not in page.tags
