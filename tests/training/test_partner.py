import io
import json
import sys
import threading

import pytest
import torch
from rich.console import Console
from torch import nn

from bitwright.errors import BitwrightError
from bitwright.layers.waiting import QuantBatchNorm2d
from bitwright.training import setup
from bitwright.training.folder import RunFolder
from bitwright.training.interrupt import Interrupted, StopSignals
from bitwright.training.loop import Trainer
from bitwright.training.partner import get_partner, partner_key
from bitwright.training.report import Reporter
from bitwright.training.setup import recipe_data

from .runs import PARTNER, StopAfter, quiet, recipe, resume, state_of, train


def partner_of(folder, *overrides, stop=None, reporter=None):
    made = recipe(folder, *overrides)
    return get_partner(
        made,
        recipe_data(made),
        cache=folder / "cache",
        reporter=reporter or quiet(),
        stop=stop or StopSignals(),
    )


def partners(folder):
    return sorted(p for p in (folder / "cache" / "partners").iterdir() if p.is_dir())


def test_a_partner_is_trained_once_and_then_the_same(tmp_path):
    first = partner_of(tmp_path, PARTNER)
    (folder,) = partners(tmp_path)
    stamp = (folder / "checkpoint.pt").stat().st_mtime_ns
    again = partner_of(tmp_path, PARTNER, "bits=w2a2", "seed=3", "methods=[kd]")
    assert (folder / "checkpoint.pt").stat().st_mtime_ns == stamp
    assert again.accuracy == first.accuracy == json.loads((folder / "summary.json").read_text())["accuracy"]
    for a, b in zip(first.model.state_dict().values(), again.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert not again.model.training
    assert not any(p.requires_grad for p in again.model.parameters())


@pytest.mark.parametrize(
    "change",
    [
        "partner.seed=1",
        "partner.schedule.epochs=1",
        "model.options.width=5",
        "data.options.subset=401",
        "data.options.mean=[0.5]",
        "channels_last=true",
    ],
)
def test_whatever_determines_the_partner_is_in_its_key(tmp_path, change):
    keys = []
    for overrides in ((PARTNER,), (PARTNER, change)):
        made = recipe(tmp_path, *overrides)
        keys.append(partner_key(made, recipe_data(made)))
    assert keys[0] != keys[1]


def test_a_network_of_the_users_that_changed_gets_another_partner(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    made = recipe(tmp_path, PARTNER, "model={name: 'own_net.py:net'}")
    keys = set()
    for activation in ("ReLU", "ReLU", "GELU"):
        text = "from torch import nn\ndef net():\n    return nn.Sequential(nn.Flatten(), nn.{}(), nn.Linear(64, 10))\n"
        (tmp_path / "own_net.py").write_text(text.format(activation))
        sys.modules.pop("own_net", None)
        keys.add(partner_key(made, recipe_data(made)))
    assert len(keys) == 2


def test_training_starts_from_the_partner(tmp_path, monkeypatch):
    partner = partner_of(tmp_path, PARTNER)

    def at_once(self):
        raise Interrupted(15)

    monkeypatch.setattr(Trainer, "_train_epoch", at_once)
    with pytest.raises(Interrupted):
        train(tmp_path, PARTNER)
    weights = state_of(tmp_path)["model"]  # the checkpoint that is written before the first step
    for name, value in partner.model.state_dict().items():
        assert torch.equal(weights[name], value), name


def test_a_stop_during_the_partners_training_resumes_to_the_same_network(tmp_path):
    whole = partner_of(tmp_path / "whole", PARTNER)
    stops = 0
    while True:
        try:
            pieces = partner_of(tmp_path / "pieces", PARTNER, stop=StopAfter(8))
            break
        except Interrupted:
            stops += 1
            assert stops < 50
    assert stops >= 1
    for a, b in zip(whole.model.state_dict().values(), pieces.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_a_run_stopped_before_its_first_checkpoint_resumes(tmp_path):
    with pytest.raises(Interrupted):
        train(tmp_path, PARTNER, stop=StopAfter(2))
    assert not (tmp_path / "run" / "checkpoint.pt").exists()
    assert resume(tmp_path)["epochs"] == 3


def test_a_second_run_waits_for_the_one_that_trains(tmp_path):
    made = recipe(tmp_path, PARTNER)
    dataset = recipe_data(made)
    waiting = threading.Event()

    class Listening(Reporter):
        def note(self, text):
            if "waiting" in text:
                waiting.set()

    class Slow(Reporter):
        def epoch(self, row, epochs):
            assert waiting.wait(60)

    found = {}

    def get(name, reporter):
        found[name] = get_partner(made, dataset, cache=tmp_path / "cache", reporter=reporter, stop=StopSignals())

    def console():
        return Console(file=io.StringIO())

    one = threading.Thread(target=get, args=("one", Slow(console())))
    one.start()
    while not list((tmp_path / "cache").glob("partners/*/recipe.yaml")):
        pass
    get("two", Listening(console()))
    one.join()
    assert waiting.is_set()
    assert found["one"].accuracy == found["two"].accuracy


def test_weights_from_a_file(tmp_path):
    trained = partner_of(tmp_path, PARTNER)
    torch.save(trained.model.state_dict(), tmp_path / "float.pt")
    given = partner_of(tmp_path, f"partner={{checkpoint: '{tmp_path / 'float.pt'}'}}")
    assert given.accuracy == trained.accuracy
    with pytest.raises(BitwrightError, match=r"tiny.yaml: .*float.pt does not fit the model"):
        partner_of(tmp_path, f"partner={{checkpoint: '{tmp_path / 'float.pt'}'}}", "model.options.width=5")


def test_a_damaged_cache_is_named(tmp_path):
    partner_of(tmp_path, PARTNER)
    folder = RunFolder(partners(tmp_path)[0])
    summary = folder.summary.read_text()
    folder.summary.write_text(summary[:20])
    with pytest.raises(BitwrightError, match=r"summary.json: damaged .*remove the folder to train again"):
        partner_of(tmp_path, PARTNER)
    folder.summary.write_text(summary)
    folder.checkpoint.write_bytes(b"nonsense")
    with pytest.raises(BitwrightError, match=r"checkpoint.pt: not a checkpoint"):
        partner_of(tmp_path, PARTNER)


def test_an_unwritable_cache_is_one_line(tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(BitwrightError, match="cannot be written"):
        partner_of(tmp_path, PARTNER)


def test_a_float_partner_trains_with_norms_that_wait_as_it_would_without(tmp_path, monkeypatch):
    partner = partner_of(tmp_path, PARTNER)
    assert not any(isinstance(m, QuantBatchNorm2d) for m in partner.model.modules())  # as a user's float model
    seen = []
    monkeypatch.setattr(
        setup, "let_wait", lambda model: seen.append(sum(type(m) is nn.BatchNorm2d for m in model.modules()))
    )
    plain = partner_of(tmp_path / "plain", PARTNER)
    assert seen[0] > 0
    for (name, a), b in zip(partner.model.state_dict().items(), plain.model.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-3, msg=name)
