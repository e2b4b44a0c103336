import os
from types import SimpleNamespace

import pytest
import torch

import epo_kernels.train.io.checkpoint as checkpoint_module
from epo_kernels.train.config import ConfigError, ModelConfig
from epo_kernels.train.io.checkpoint import (
    SaveError,
    drop_later_checkpoints,
    list_checkpoints,
    load_state,
    room_warning,
    save_checkpoint,
    step_of,
)
from epo_kernels.train.io.run_dir import clear_records
from epo_kernels.train.models.policy import load_policy


def test_a_policy_comes_back_to_the_last_bit(cloned, tmp_path):
    state = {"step": 3, "nested": {"tensor": torch.arange(3.0), "none": None}, "text": "x"}
    folder = save_checkpoint(tmp_path, 3, cloned.save, state, keep=2)
    assert folder.name == "global_step_3"
    again = load_policy(str(folder / "actor"), ModelConfig())
    saved = cloned.model.state_dict()
    assert again.model.state_dict().keys() == saved.keys()
    assert all(torch.equal(saved[name], value) for name, value in again.model.state_dict().items())
    text = (
        "<|user|>Sign: moon, by night. Gold glints left.\n> go left\n\n12,345 tâches (déjà vu)\n<|act|>go<|endoftext|>"
    )
    assert again.tokenizer(text)["input_ids"] == cloned.tokenizer(text)["input_ids"]
    assert cloned.tokenizer.decode(cloned.tokenizer(text)["input_ids"]) == text
    messages = [{"role": "user", "content": "hello"}]
    assert again.tokenizer.apply_chat_template(messages, tokenize=False) == "<|user|>hello"
    loaded = load_state(folder)
    assert loaded["step"] == 3
    assert torch.equal(loaded["nested"]["tensor"], torch.arange(3.0))


def test_the_last_ones_are_kept(cloned, tmp_path):
    for step in (0, 5, 10, 15):
        save_checkpoint(tmp_path, step, cloned.save, {}, keep=2)
    assert [step_of(path) for path in list_checkpoints(tmp_path)] == [10, 15]


def test_a_rewound_run_keeps_what_it_writes(cloned, tmp_path):
    for step in (20, 30):
        save_checkpoint(tmp_path, step, cloned.save, {}, keep=2)
    save_checkpoint(tmp_path, 22, cloned.save, {}, keep=1)
    assert 22 in [step_of(path) for path in list_checkpoints(tmp_path)]
    drop_later_checkpoints(tmp_path, 22)
    assert [step_of(path) for path in list_checkpoints(tmp_path)] == [22]


def test_a_run_without_a_checkpoint_starts_clean(tmp_path):
    (tmp_path / "reference").mkdir()
    for name in ("metrics.jsonl", "evaluation.json", "reference/model.safetensors", "mine.txt"):
        (tmp_path / name).write_text("old")
    clear_records(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_failed_save_leaves_the_old_ones_whole(cloned, tmp_path, monkeypatch):
    save_checkpoint(tmp_path, 1, cloned.save, {"step": 1}, keep=1)

    def full_disk(state, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_module.torch, "save", full_disk)
    with pytest.raises(SaveError, match=r"No space left.*global_step_1 is whole\. Make room"):
        save_checkpoint(tmp_path, 2, cloned.save, {"step": 2}, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["global_step_1"]
    assert load_state(tmp_path / "global_step_1") == {"step": 1}


def test_a_disk_too_small_for_the_checkpoints_is_told_at_the_start(tmp_path, monkeypatch):
    (tmp_path / "global_step_0").mkdir()
    (tmp_path / "global_step_0" / "trainer.pt").write_bytes(bytes(1000))
    needed = 3 * (12 * 100 + 4 * 50)
    for free, enough in ((needed - 1000, True), (needed - 1001, False)):
        monkeypatch.setattr(checkpoint_module.shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        warning = room_warning(tmp_path, trained=100, other=50, keep=2)
        assert (warning is None) == enough
    assert "3 checkpoints" in warning
    assert room_warning(tmp_path / "not" / "there", trained=0, other=0, keep=1) is None


def test_what_a_kill_left_behind_is_no_checkpoint(cloned, tmp_path):
    (tmp_path / ".writing_global_step_7" / "actor").mkdir(parents=True)
    assert list_checkpoints(tmp_path) == []
    save_checkpoint(tmp_path, 7, cloned.save, {"step": 7}, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["global_step_7"]


def test_what_an_interrupted_removal_left_behind_is_no_checkpoint(cloned, tmp_path, monkeypatch):
    for step in (1, 2):
        save_checkpoint(tmp_path, step, cloned.save, {}, keep=2)
    with monkeypatch.context() as patch:

        def halfway(path):
            (path / "trainer.pt").unlink()
            raise OSError(16, "Device or resource busy")

        patch.setattr(checkpoint_module.shutil, "rmtree", halfway)
        with pytest.raises(OSError, match="busy"):
            drop_later_checkpoints(tmp_path, 1)
        assert [step_of(path) for path in list_checkpoints(tmp_path)] == [1]
    save_checkpoint(tmp_path, 2, cloned.save, {}, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["global_step_2"]


def test_a_checkpoint_that_cannot_be_removed_stops_no_save(cloned, tmp_path, monkeypatch):
    remove = checkpoint_module.shutil.rmtree

    def busy(path, ignore_errors=False):
        if "global_step_1" not in path.name:
            remove(path, ignore_errors)
        elif not ignore_errors:
            raise OSError(16, "Device or resource busy")

    monkeypatch.setattr(checkpoint_module.shutil, "rmtree", busy)
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, cloned.save, {}, keep=1)
    assert [step_of(path) for path in list_checkpoints(tmp_path)] == [3]


class Malicious:
    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("content", ["malicious", "a function", "truncated", "no pickle"])
def test_pickles_of_strangers_are_refused_and_not_run(cloned, tmp_path, content):
    folder = save_checkpoint(tmp_path, 1, cloned.save, {"step": 1, "tensor": torch.ones(1000)}, keep=1)
    path, trace = folder / "trainer.pt", tmp_path / "trace"
    if content == "malicious":
        torch.save({"step": 1, "learner": Malicious(trace)}, path)
    elif content == "a function":
        torch.save({"step": print}, path)
    elif content == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    else:
        path.write_bytes(b"#!/bin/sh\n")
    with pytest.raises(ConfigError, match=r"trainer\.pt cannot be loaded.*resume=FOLDER"):
        load_state(folder)
    assert not trace.exists()


def test_weights_of_strangers_are_read_from_safetensors_alone(cloned, tmp_path):
    cloned.save(tmp_path / "actor")
    (tmp_path / "actor" / "model.safetensors").unlink()
    torch.save(Malicious(tmp_path / "trace"), tmp_path / "actor" / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"has no \.safetensors file, only pytorch_model\.bin, a pickle"):
        load_policy(str(tmp_path / "actor"), ModelConfig())
    assert not (tmp_path / "trace").exists()


def test_names_that_are_none(tmp_path):
    with pytest.raises(ValueError, match="global_step_N"):
        step_of(tmp_path / "actor")
