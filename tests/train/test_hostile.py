"""Model output is only text for the environment."""

import ast
import json
from pathlib import Path

import epo_kernels.train
import epo_kernels.train.rollout.rollout as rollout_module
from epo_kernels.train.io.report import write_report
from epo_kernels.train.io.tracking import read_episodes
from tests.train.conftest import lines_of, train
from tests.train.test_report import Page

HOSTILE = (
    "\x1b[2J\x1b]0;owned\x07 <script>alert(1)</script> [link=http://evil]x[/link] {{ 7*7 }} \u202e \u2028 "
    "$(touch owned) ../../x"
)


def test_nothing_that_a_model_writes_gets_through(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rollout_module, "parse_action", lambda text, response_format: HOSTILE)
    assert train("run_dir=run", "steps=1", "evaluate.decoding=[sampled]") == 0
    shown = capfd.readouterr()
    assert "\x1b" not in shown.out + shown.err
    run_dir = tmp_path / "run"
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    for path in (run_dir / "episodes").glob("*.txt"):
        text = path.read_text()
        assert "\x1b" not in text
        assert "\\x1b[2J\\x1b]0;owned\\x07 <script>alert(1)</script> [link=http://evil]" in text
    assert read_episodes(run_dir, "after_iid_sampled")[0]["turns"][0]["action"] == HOSTILE
    assert len(lines_of(run_dir)) == 1
    html = write_report(run_dir).read_text()
    page = Page(html)
    assert "script" not in page.tags
    assert page.links == []
    assert "{{ 7*7 }}" in page.text
    assert "\x1b" not in html
    assert "\u202e" not in html


def calls_of(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}


def test_the_driver_has_no_shell_no_eval_and_reads_no_pickle():
    for path in Path(epo_kernels.train.__path__[0]).rglob("*.py"):
        for name, words in calls_of(ast.parse(path.read_text())):
            where = f"{path.name}: {name}"
            assert name not in ("eval", "exec", "compile", "os.system", "os.popen", "__import__"), where
            assert not name.startswith(("pickle.load", "marshal.", "joblib.", "dill.")), where
            assert words.get("shell", "False") == "False", where
            assert words.get("trust_remote_code", "False") == "False", where
            if (name.startswith("Auto") and name.endswith("from_pretrained")) or name == "EngineArgs":
                assert words["trust_remote_code"] == "False", where
            if name == "torch.load":
                assert words["weights_only"] == "True", where


def test_jsonl_holds_one_line_an_episode_whatever_is_in_it(tmp_path, monkeypatch):
    monkeypatch.setattr(rollout_module, "parse_action", lambda text, response_format: "a\u2028b\u2029c\x85de\nf")
    assert train(f"run_dir={tmp_path}", "steps=0", "evaluate.decoding=[greedy]") == 0
    raw = (tmp_path / "episodes" / "before_iid_greedy.jsonl").read_bytes()
    assert raw.isascii()
    lines = raw.decode().splitlines()
    assert len(lines) == 4
    assert json.loads(lines[0])["turns"][0]["action"] == "a\u2028b\u2029c\x85de\nf"
