import os
import pickle
import random

import numpy as np
import pytest
import torch

from bitwright.errors import BitwrightError
from bitwright.training.checkpoint import (
    RUN_PARTS,
    load_checkpoint,
    rng_state,
    save_checkpoint,
    seed_everything,
    set_rng_state,
    write_atomic,
)


def error_of(path, **options):
    with pytest.raises(BitwrightError) as caught:
        load_checkpoint(path, **options)
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith(str(path))
    return text


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"recipe": "abc", "x": torch.arange(5000.0), "rows": [{"a": 1.5}], "none": None})
    return path


def test_what_is_saved_is_loaded(saved):
    state = load_checkpoint(saved)
    assert torch.equal(state["x"], torch.arange(5000.0))
    assert state["rows"] == [{"a": 1.5}]
    assert state["none"] is None


def test_another_recipe_is_refused(saved):
    assert "made by another recipe" in error_of(saved, digest="abd")


def test_a_run_without_a_part_is_refused(tmp_path):
    path = tmp_path / "checkpoint.pt"
    whole = {"recipe": "abc", **dict.fromkeys(RUN_PARTS, 1)}
    save_checkpoint(path, whole)
    assert load_checkpoint(path, digest="abc").keys() == {"format", *whole}
    for part in RUN_PARTS:
        save_checkpoint(path, {k: v for k, v in whole.items() if k != part})
        assert error_of(path, digest="abc").endswith(f"not a whole checkpoint of a run (lacks {part})")
    save_checkpoint(path, {"model": {}})
    assert "made by another recipe" in error_of(path, digest="abc")


@pytest.mark.parametrize("keep", [0, 1, 100, 0.5, 0.99])
def test_truncated_files_are_refused(saved, keep):
    content = saved.read_bytes()
    saved.write_bytes(content[: int(keep if keep > 1 or keep in (0, 1) else keep * len(content))])
    error_of(saved)


def test_one_changed_byte_of_a_tensor_is_noticed(saved):
    content = bytearray(saved.read_bytes())
    place = content.index(torch.arange(100.0, 104.0).numpy().tobytes())
    content[place] ^= 1
    saved.write_bytes(content)
    assert "damaged" in error_of(saved)


def test_foreign_files_are_refused_and_not_executed(tmp_path):
    marker = tmp_path / "executed"

    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(marker),))

    (tmp_path / "pickle.pt").write_bytes(pickle.dumps(Evil()))
    torch.save({"x": Evil()}, tmp_path / "torch.pt")
    torch.save({"x": torch.ones(1)}, tmp_path / "other.pt")
    torch.save([1], tmp_path / "list.pt")
    (tmp_path / "text.pt").write_text("hello")
    for name in ("pickle.pt", "torch.pt", "other.pt", "list.pt", "text.pt", "none.pt"):
        error_of(tmp_path / name)
    assert not marker.exists()


def test_a_failed_write_leaves_the_old_file_and_no_rubbish(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomic(path, "old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(BitwrightError, match=r"file: cannot be written \(No space left on device\)"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_folders_that_cannot_be_made_are_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BitwrightError, match="cannot be written"):
        write_atomic(tmp_path / "file" / "inside", "x")


def test_random_states_come_back(tmp_path):
    seed_everything(7)
    torch.randn(3)
    np.random.normal(size=3)
    random.gauss(0, 1)  # leaves a cached second value
    save_checkpoint(tmp_path / "c.pt", {"recipe": "", "random": rng_state()})

    def draws():
        return torch.randn(4).tolist(), np.random.normal(size=5).tolist(), [random.gauss(0, 1) for _ in range(3)]

    first = draws()
    seed_everything(8)
    assert draws() != first
    set_rng_state(load_checkpoint(tmp_path / "c.pt")["random"])
    assert draws() == first
