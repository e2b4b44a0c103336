"""The orchestration, tried with commands that fail, hang and end in time."""

import sys
import time

import pytest

from bench import gpu_check
from bench.gpu_check import Stage, run_stages


def stage(name, code, **arguments):
    return Stage(name, (sys.executable, "-c", code), **{"limit": 20.0, **arguments})


def statuses(outcomes):
    return {outcome.stage: outcome.status for outcome in outcomes}


def test_a_failure_is_reported_and_the_rest_still_runs(tmp_path, capsys):
    log = tmp_path / "log.txt"
    stages = [
        stage("bad", "import sys; print('what went wrong'); sys.exit(2)"),
        Stage("absent", ("/no/such/program",)),
        Stage("left out", None, note="nothing to do"),
        stage("good", "print('fine')"),
    ]
    found = statuses(run_stages(stages, log, budget=60.0))
    assert found["bad"] == "failed: exit code 2"
    assert found["absent"].startswith("failed: ")
    assert found["left out"] == "skipped: nothing to do"
    assert found["good"] == "ok"
    assert "fine" in log.read_text()
    assert "what went wrong" in capsys.readouterr().out


def test_a_stage_that_hangs_is_ended_with_its_children(tmp_path):
    child = tmp_path / "child-lives"
    later = f"import time; time.sleep(2); open({str(child)!r}, 'w')"
    code = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {later!r}]); time.sleep(30)"
    began = time.monotonic()
    (outcome,) = run_stages([stage("hangs", code, limit=1.0)], tmp_path / "log.txt", budget=60.0)
    assert outcome.status == "failed: took more than 1 s"
    assert time.monotonic() - began < 10.0
    time.sleep(2.0)
    assert not child.exists()


def test_stages_beside_each_other_run_at_once_and_log_apart(tmp_path):
    meet = (
        "from pathlib import Path; import sys, time; mine, other = map(Path, {names!r}); mine.touch()\n"
        "while not other.exists(): time.sleep(0.01)\n"
        "for i in range(3): print({names[0]!r}, i, flush=True); time.sleep(0.05)"
    )
    one, two = (str(tmp_path / name) for name in ("one", "two"))
    stages = [
        stage("one", meet.format(names=[one, two]), limit=20.0),
        stage("two", meet.format(names=[two, one]), limit=20.0, beside=True),
        stage("after", "print('alone')"),
    ]
    log = tmp_path / "log.txt"
    assert set(statuses(run_stages(stages, log, budget=60.0)).values()) == {"ok"}
    said = [line for line in log.read_text().splitlines() if line == "alone" or line[-2:] in (" 0", " 1", " 2")]
    assert said == [*(f"{name} {i}" for name in (one, two) for i in range(3)), "alone"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.txt", "one", "two"]


def test_what_the_budget_leaves_no_time_for_is_said(tmp_path):
    stages = [
        stage("first", "pass"),
        stage("second", "pass", reserved=2.0),
        stage("report", "pass", reserved=16.0),
    ]
    found = statuses(run_stages(stages, tmp_path / "log.txt", budget=20.0))
    assert found == {"first": "skipped: no time left", "second": "skipped: no time left", "report": "ok"}


def test_a_lost_device_is_tried_again_with_a_new_process(tmp_path):
    count = tmp_path / "count"
    code = (
        f"from pathlib import Path; import sys; path = Path({str(count)!r});"
        "n = int(path.read_text()) + 1 if path.exists() else 1; path.write_text(str(n)); sys.exit(3 if n < 3 else 0)"
    )
    (outcome,) = run_stages([stage("benchmarks", code, again_on=3)], tmp_path / "log.txt", budget=60.0)
    assert outcome.status == "ok"
    assert count.read_text() == "3"


def test_stages_come_in_the_order_of_their_worth(tmp_path, monkeypatch):
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    (wheels / "trl-1.16.0-py3-none-any.whl").touch()
    monkeypatch.setenv("EPO_WHEELS", str(wheels))
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name: f"/usr/bin/{name}")
    stages = gpu_check.plan(tmp_path, dry=False, budget=560.0, site=tmp_path / "site", bench_arguments=["-k", "linear"])
    names = [entry.name for entry in stages]
    by_name = {entry.name: entry for entry in stages}
    assert names == [
        *("machine", "wheels", "build", "backends"),
        *("tests", "memcheck", "racecheck", "benchmarks", "report"),
    ]
    assert [entry.name for entry in stages if entry.beside] == ["memcheck", "racecheck"]  # the benchmarks are alone
    assert by_name["wheels"].command[-1].endswith("trl-1.16.0-py3-none-any.whl")
    assert {"--bench-resume", "--bench-device=cuda", "linear"} <= set(by_name["benchmarks"].command)
    before_benchmarks = sum(entry.limit for entry in stages[: names.index("benchmarks")] if not entry.beside)
    assert by_name["report"].reserved == gpu_check.REPORT_SECONDS
    assert before_benchmarks + gpu_check.REPORT_SECONDS + 60 <= gpu_check.BUDGET_SECONDS


def test_backends_that_are_not_there_are_named():
    assert gpu_check.missing(["reference"]) == []
    (reason,) = gpu_check.missing(["no-such"])
    assert reason == "no-such: unknown"


def test_exit_code_and_table(tmp_path, monkeypatch, capsys):
    plans = {"code": "pass"}
    given = []

    def plan(out, dry, budget, site, bench_arguments):
        given.append(bench_arguments)
        return [stage("only", plans["code"]), stage("other", "pass")]

    monkeypatch.setattr(gpu_check, "plan", plan)
    assert gpu_check.main([str(tmp_path)]) == 0
    plans["code"] = "raise SystemExit(1)"
    assert gpu_check.main([str(tmp_path)]) == 1
    assert "| only | failed: exit code 1 |" in capsys.readouterr().out
    assert gpu_check.main([str(tmp_path), "--only", "other", "--bench=-k 'linear and ours'"]) == 0
    assert given == [[], [], ["-k", "linear and ours"]]


def test_build_is_for_this_device_alone(tmp_path, monkeypatch):
    commands = []

    def pretend(command, check):
        commands.append([str(part) for part in command])
        (tmp_path / "build").mkdir(exist_ok=True)
        (tmp_path / "build" / "_native.cpython.so").write_text("built")

    monkeypatch.setattr(gpu_check, "architecture", lambda: "90a")
    monkeypatch.setattr(gpu_check.subprocess, "run", pretend)
    (tmp_path / "package").mkdir()
    gpu_check.build(tmp_path / "package", tmp_path / "build")
    assert "-DEPO_CUDA_ARCHS=90a" in commands[0]
    assert commands[1][1:4] == ["--build", str(tmp_path / "build"), "--target"]
    assert (tmp_path / "package" / "_native.cpython.so").read_text() == "built"


@pytest.mark.parametrize(("answer", "expected"), [("9.0\n", "90a"), ("10.0\n", "100"), ("8.0\n8.0\n", "80")])
def test_architecture_is_asked_of_the_driver(monkeypatch, answer, expected):
    class Done:
        stdout = answer

    monkeypatch.setattr(gpu_check.subprocess, "run", lambda *_, **__: Done())
    assert gpu_check.architecture() == expected
