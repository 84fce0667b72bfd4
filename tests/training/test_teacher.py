"""A teacher beside the partner: another architecture, from where a partner comes, for `kd` alone."""

import json

import pytest
import torch

from bitwright.errors import BitwrightError
from bitwright.methods import KD
from bitwright.training import methods
from bitwright.training.checkpoint import load_checkpoint
from bitwright.training.interrupt import Interrupted

from .runs import PARTNER, StopAfter, recipe, resume, state_of, train

OWN = "model: {name: resnet8, options: {width: 6}}, optimizer: {lr: 0.1}, schedule: {epochs: 1, batch_size: 100}"
TEACHER = f"teacher={{{OWN}}}"
KD_ONLY = "methods=[kd]"


def test_kd_learns_from_the_teacher_and_training_starts_from_the_partner(tmp_path, monkeypatch):
    given = []

    class Seen(KD):
        def __init__(self, teacher, **options):
            given.append(teacher)
            super().__init__(teacher, **options)

    monkeypatch.setattr(methods, "KD", Seen)
    summary = train(tmp_path, PARTNER, TEACHER, KD_ONLY)
    made = given[-1]  # after the rehearsal's
    assert made.conv1.weight.shape[0] == 6
    assert not any(p.requires_grad for p in made.parameters())
    folders = [p for p in (tmp_path / "cache" / "partners").iterdir() if p.is_dir()]
    found = {json.loads((p / "summary.json").read_text())["accuracy"]: p for p in folders}
    assert len(folders) == 2
    trained = load_checkpoint(found[summary["teacher_accuracy"]] / "checkpoint.pt")["model"]
    assert all(torch.equal(value, trained[name]) for name, value in made.state_dict().items())
    plain = train(tmp_path / "plain", PARTNER, KD_ONLY)
    assert "teacher_accuracy" not in plain
    assert plain["float_accuracy"] == summary["float_accuracy"] != summary["teacher_accuracy"]
    assert plain["recipe"] != summary["recipe"]


def test_a_teacher_needs_no_partner(tmp_path):
    summary = train(tmp_path, TEACHER, KD_ONLY, "schedule.epochs=1")
    assert "float_accuracy" not in summary
    assert 0 < summary["teacher_accuracy"] <= 1


def test_weights_of_a_teacher_from_a_file(tmp_path):
    summary = train(tmp_path, TEACHER, KD_ONLY, "schedule.epochs=1")
    folder = next(p for p in (tmp_path / "cache" / "partners").iterdir() if p.is_dir())
    file = tmp_path / "weights.pt"
    torch.save(load_checkpoint(folder / "checkpoint.pt")["model"], file)
    given = f"teacher={{model: {{name: resnet8, options: {{width: 6}}}}, checkpoint: {file}}}"
    again = train(tmp_path / "again", given, KD_ONLY, "schedule.epochs=1")
    assert again["teacher_accuracy"] == summary["teacher_accuracy"]
    for a, b in zip(state_of(tmp_path)["model"].values(), state_of(tmp_path / "again")["model"].values(), strict=True):
        assert torch.equal(a, b)


def test_a_stopped_run_ends_bit_identical(tmp_path):
    train(tmp_path / "whole", PARTNER, TEACHER, KD_ONLY)
    with pytest.raises(Interrupted):
        train(tmp_path / "parts", PARTNER, TEACHER, KD_ONLY, stop=StopAfter(18))
    resume(tmp_path / "parts")
    whole, parts = (state_of(tmp_path / name)["model"] for name in ("whole", "parts"))
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        ((TEACHER,), "teacher: nothing learns from it; add kd or relational to methods"),
        ((KD_ONLY, "teacher={model: {name: resnet9}}"), "unknown model 'resnet9'"),
        ((KD_ONLY, "teacher={schedule: {epochs: 1}}"), "teacher.model is missing"),
        ((KD_ONLY, "teacher={model: {name: resnet8}, pretrained: true, checkpoint: x.pt}"), "either checkpoint or"),
    ],
)
def test_what_is_refused_before_anything_is_trained(tmp_path, overrides, line):
    with pytest.raises(BitwrightError, match=line) as caught:
        train(tmp_path, *overrides)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "cache").exists()


def test_recipes_without_a_teacher_keep_their_digest(tmp_path):
    """It names runs and cached partners that were there before teachers were."""
    assert "teacher" not in recipe(tmp_path).model_dump(exclude_none=True)
    with_one, without = recipe(tmp_path, TEACHER, KD_ONLY), recipe(tmp_path, KD_ONLY)
    assert with_one.digest() != without.digest()
    assert without.digest() == "b831e26dbc55d2990a36b2973270ed1c1bd8e8e30c9d4a818da27636981191ae"
