"""The file's format, which other programs read."""

import json
from dataclasses import replace

import pytest
import torch

from bench import records
from bench.records import Machine, Record

MACHINE = Machine("NVIDIA H200", "cuda", "Linux x86_64", 16, 16, "580.1", {"torch": "2.11.0"})
PROMISED = {
    "case",
    "impl",
    "median_ms",
    "floor_ms",
    "ratio_to_floor",
    "ratio_to_ours",
    "peak_mb",
    "gate",
    "computes",
}


def record(case="loss/a", impl="ours:cuda", median=1.0, **others):
    values = {
        "floor_ms": 0.5,
        "ratio_to_floor": 2.0,
        "ratio_to_ours": 1.0,
        "peak_mb": 10.0,
        "gate": "pass",
        "computes": "all",
        "spread_ms": [0.98 * median, 1.02 * median] if median else None,
        "date": "2026-11-21T10:00Z",
        "commit": "abc1234",
    }
    return Record(case, impl, median, **{**values, **others})


def test_file_is_a_list_of_the_machine_and_the_promised_fields(tmp_path):
    path = tmp_path / "new" / "results.json"
    records.write(path, MACHINE, [record(), record(impl="peer", median=None, gate="fails: wrong")])
    machine, *others = json.loads(path.read_text())
    assert machine["machine"] == "NVIDIA H200"
    assert machine["versions"] == {"torch": "2.11.0"}
    assert all(entry.keys() >= PROMISED for entry in others)
    assert others[1]["median_ms"] is None
    assert others[1]["gate"] == "fails: wrong"
    assert records.read(path) == (MACHINE, [record(), record(impl="peer", median=None, gate="fails: wrong")])


def test_figures_are_rounded_to_what_is_known(tmp_path):
    records.write(tmp_path / "results.json", MACHINE, [record(median=1.23456789, phases_ms={"loss": 0.000123456789})])
    (_, (read,)) = records.read(tmp_path / "results.json")
    assert read.median_ms == 1.2346
    assert read.phases_ms == {"loss": 0.00012346}


def test_new_records_take_the_places_of_old_ones(tmp_path):
    path = tmp_path / "results.json"
    records.write(path, MACHINE, [record("a"), record("b")])
    newer = replace(MACHINE, versions={**MACHINE.versions, "trl": "1.16.0"})
    machine, kept = records.merged(path, newer, [record("b", median=3.0), record("c")])
    assert [(entry.case, entry.median_ms) for entry in kept] == [("a", 1.0), ("b", 3.0), ("c", 1.0)]
    assert machine.versions == {"torch": "2.11.0", "trl": "1.16.0"}


def test_figures_of_another_machine_or_torch_are_not_mixed(tmp_path):
    path = tmp_path / "results.json"
    records.write(path, MACHINE, [record("a")])
    for other in (replace(MACHINE, machine="NVIDIA A100"), replace(MACHINE, versions={"torch": "2.12.0"})):
        assert records.merged(path, other, [record("b")]) == (other, [record("b")])


@pytest.mark.parametrize("content", ["{}", "[]", '[{"machine": "x"}]', "no json"])
def test_another_file_is_refused_with_a_cure(tmp_path, content):
    path = tmp_path / "results.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="measure again"):
        records.read(path)


def test_folders_are_named_after_machines():
    assert MACHINE.folder == "h200"
    assert replace(MACHINE, machine="NVIDIA GeForce RTX 4090").folder == "rtx-4090"
    assert replace(MACHINE, machine="AMD EPYC (x)", device_type="cpu").folder == "cpu-amd-epyc-x"


def test_this_machine_says_what_matters():
    machine = records.this_machine(torch.device("cpu"), {"trl": "1.16.0"})
    assert machine.machine
    assert machine.threads == torch.get_num_threads()
    assert machine.versions["torch"] == torch.__version__
    assert machine.versions["trl"] == "1.16.0"
