"""Real offline W&B runs, whose files in run_dir/wandb are read back."""

import json
import shutil
import struct

import wandb
from wandb.proto import wandb_internal_pb2

from epo_kernels.train.__main__ import main
from epo_kernels.train.config import load_config
from epo_kernels.train.io.weights_and_biases import STEP, WeightsAndBiases
from tests.train.conftest import SMALL, lines_of


def train(run_dir, *settings):
    return main(["practice", *SMALL, f"run_dir={run_dir}", "tracking.wandb=offline", *map(str, settings)])


def records_of(file):
    """Of a .wandb file: seven bytes, then a LevelDB log (blocks of 32 KiB, parts with checksum, length and type)."""
    data, record = file.read_bytes(), b""
    assert data[:4] == b":W&B"
    at = 7
    while at < len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield wandb_internal_pb2.Record.FromString(record)
            record = b""


def logs_of(run_dir):
    """The records of each process, in order."""
    wandb.teardown()  # its service writes to the end
    return [list(records_of(file)) for file in sorted((run_dir / "wandb").glob("offline-run-*/*.wandb"))]


def rows_of(run_dir):
    """What each process wrote, in order: [(the run's record, its rows)]."""
    processes = []
    for records in logs_of(run_dir):
        (run,) = [record.run for record in records if record.HasField("run")]
        rows = []
        for record in records:
            if record.HasField("history"):
                items = {item.key or item.nested_key[0]: item.value_json for item in record.history.item}
                rows.append({key: json.loads(v) for key, v in items.items() if not key.startswith("_")})
        processes.append((run, rows))
    return processes


def test_a_run_and_its_resumption_are_one_run(tmp_path, capsys):
    run_dir = tmp_path / "run"
    settings = ["checkpoint.keep=9", "evaluate.decoding=[greedy]"]
    assert train(run_dir, "tracking.wandb_project=agents", *settings) == 0
    assert "W&B: kept in" in capsys.readouterr().out
    lines = lines_of(run_dir)
    ((first, rows),) = rows_of(run_dir)
    assert (first.project, first.display_name) == ("agents", "run")
    configured = {item.key: json.loads(item.value_json) for item in first.config.update}
    assert configured["algorithm.groups"] == 2
    assert configured["tracking.wandb"] == "offline"

    steps = [row for row in rows if "actor/pg_loss" in row]
    assert [row[STEP] for row in steps] == [1, 2]
    for row, line in zip(steps, lines, strict=True):
        for name, value in line.items():
            if isinstance(value, list):
                entries = {f"{name}/{i:02d}": number for i, number in enumerate(value) if number is not None}
                assert {entry: row.get(entry) for entry in entries} == entries
            elif value is not None:
                assert row[name] == value, name
    evaluated = [row for row in rows if "evaluation/iid/greedy/success" in row]
    records = json.loads((run_dir / "evaluation.json").read_text())
    assert [(row[STEP], row["evaluation/iid/greedy/mean_score"]) for row in evaluated] == [
        (record["step"], record["mean_score"]) for record in records
    ]

    shutil.rmtree(run_dir / "checkpoints" / "global_step_2")
    assert train(run_dir, *settings) == 0  # makes step 2 again; the project may change, as all of tracking
    assert lines_of(run_dir) == lines
    (_, (second, again)) = rows_of(run_dir)
    assert second.run_id == first.run_id
    assert again == []
    assert train(tmp_path / "other", "steps=1", "evaluate.panels=[]") == 0
    ((other, _),) = rows_of(tmp_path / "other")
    assert other.run_id != first.run_id


def test_later_steps_go_on_from_what_was_sent(tmp_path):
    config = load_config("practice", ["tracking.wandb=offline"])
    for steps in ((1, 2), (2, 3)):
        board = WeightsAndBiases(tmp_path, config, print_nothing)
        for step in steps:
            board.add(step, {"actor/lr": step / 8, "actor/loss": float("nan")})
        board.add(0, {"evaluation/iid/greedy/success": 0.5})
        board.close(failed=steps == (2, 3))
    exits = [record.exit.exit_code for log in logs_of(tmp_path) for record in log if record.HasField("exit")]
    assert exits == [0, 1]
    rows = [row for _, rows in rows_of(tmp_path) for row in rows]
    assert [(row[STEP], row["actor/lr"]) for row in rows if "actor/lr" in row] == [(1, 0.125), (2, 0.25), (3, 0.375)]
    assert sum("evaluation/iid/greedy/success" in row for row in rows) == 1
    assert not any("actor/loss" in row for row in rows)


def print_nothing(_):
    pass


def test_a_server_out_of_reach_leaves_the_run_offline(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "3")
    assert train(tmp_path, "steps=1", "evaluate.panels=[]", "tracking.wandb=online") == 0
    shown = capsys.readouterr().out
    assert "warning: W&B does not start in mode online" in shown
    assert "`wandb sync` sends it" in shown
    rows = [row for _, rows in rows_of(tmp_path) for row in rows]
    assert [row[STEP] for row in rows] == [1]


def test_online_without_a_key_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))  # no ~/.netrc
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert train(tmp_path / "run", "tracking.wandb=online") == 2
    assert "finds no API key; run `wandb login`" in capsys.readouterr().err
    assert not (tmp_path / "run").exists(), "before anything was done"


def test_a_run_outlives_its_tracker(tmp_path, monkeypatch, capsys):
    def broken(*_, **__):
        raise ConnectionResetError("Connection lost")

    monkeypatch.setattr(wandb.Run, "log", broken)
    assert train(tmp_path, "evaluate.panels=[]") == 0
    shown = capsys.readouterr().out
    assert shown.count("warning: W&B failed, and the run continues without it: Connection lost") == 1
    assert len(lines_of(tmp_path)) == 2
