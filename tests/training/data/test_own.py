"""A data set from a Python file of the user's."""

import random
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from bitwright.errors import BitwrightError
from bitwright.training.checkpoint import load_checkpoint
from bitwright.training.data import Dataset, load_data
from bitwright.training.interrupt import Interrupted

from ..runs import StopAfter, resume, train

DATA = '''
import random
import numpy as np
import torch
from torch.utils.data import Dataset, Subset

class Sounds(Dataset):
    """Tones of three pitches and heights, at a random place and with noise from all three sources."""
    classes = ["low", "middle", "high"]

    def __init__(self, count, noisy, channels=1):
        self.count, self.noisy, self.channels = count, noisy, channels

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        t = torch.linspace(0, 6, 40)
        x = (torch.sin(t * (i % 3 + 1)) + i % 3).repeat(self.channels, 1)
        if self.noisy:
            x = x.roll(random.randrange(40), -1) + 0.1 * torch.randn(40) + 0.1 * float(np.random.randn())
        return x, i % 3

def load(count=96, channels=1):
    return Sounds(count, True, channels), Sounds(30, False, channels)

def at(data_dir, least=1):
    assert data_dir.endswith("sounds"), data_dir
    return load()

class Tokens(Sounds):
    num_classes, classes = 3, None
    def __getitem__(self, i):
        return np.arange(5) + i % 3, torch.tensor(i % 3)

def tokens():
    return Tokens(20, False), Tokens(4, False)

class Changed(Sounds):
    def __getitem__(self, i):
        return self.samples(i)

def changed(kind):
    made = Changed(8, False), Changed(8, False)
    good = Sounds(8, False)
    odd = {
        "shape": lambda i: (torch.zeros(1, 40 + (i == 3)), 0),
        "label": lambda i: (torch.zeros(1, 40), 3 * (i == 3)),
        "text": lambda i: (torch.zeros(1, 40), "low"),
        "half": lambda i: (torch.zeros(1, 40), 0.5),
        "bytes": lambda i: (torch.zeros(1, 40, dtype=torch.uint8), 0),
        "alone": lambda i: torch.zeros(1, 40),
        "object": lambda i: (object(), 0),
        "raises": lambda i: (torch.zeros(1, 40), [][i]),
        "later": lambda i: (torch.zeros(1, 40), [0][i]),
    }[kind]
    for split in made:
        split.samples = odd
    return made

def one():
    return Sounds(8, False)

def empty():
    return Sounds(8, False), Sounds(0, False)

def nameless():
    made = Sounds(8, False)
    made.classes = None
    return made, made

def breaks():
    return Sounds(8)
'''

NET = """
from torch import nn

def net(num_classes, in_channels, width=8):
    return nn.Sequential(nn.Flatten(), nn.Linear(40 * in_channels, width), nn.ReLU(), nn.Linear(width, width),
        nn.ReLU(), nn.Linear(width, num_classes))
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name, text in (("sounds", DATA), ("tones", NET)):
        monkeypatch.delitem(sys.modules, name, raising=False)
        (tmp_path / f"{name}.py").write_text(text)
    yield tmp_path
    for name in [n for n, m in sys.modules.items() if str(getattr(m, "__file__", "")).startswith(str(tmp_path))]:
        del sys.modules[name]


def epoch(dataset: Dataset, number: int, start: int = 0, seed: int = 0) -> tuple[Tensor, Tensor]:
    batches = dataset.train_batches(epoch=number, seed=seed, batch_size=16, device="cpu", start=start)
    xs, ys = zip(*batches, strict=True)
    return torch.cat(xs), torch.cat(ys)


def test_what_it_says_of_itself(folder: Path) -> None:
    data = load_data("sounds.py:load", workers=0, channels=2)
    assert (data.num_classes, data.in_channels, data.image_size) == (3, 2, None)
    assert (data.train_size, data.test_size, data.steps_per_epoch(16)) == (96, 30, 6)
    assert data.blank.shape == (1, 2, 40)
    assert not data.blank.any()


def test_an_epoch_repeats_and_can_be_entered_anywhere(folder: Path) -> None:
    data = load_data("sounds.py:load", workers=0)
    x, y = epoch(data, 0)
    again = epoch(data, 0)
    assert torch.equal(x, again[0])
    assert torch.equal(y, again[1])
    assert torch.equal(x[48:], epoch(data, 0, start=3)[0])
    assert sorted(y.tolist()) == [0] * 32 + [1] * 32 + [2] * 32
    # Another epoch and another seed draw other noise for the same samples.
    others = x, epoch(data, 1)[0], epoch(data, 0, seed=1)[0]
    assert len({round(float(v.double().sum()), 3) for v in others}) == 3


def test_workers_draw_what_the_process_itself_draws(folder: Path) -> None:
    alone, helped = (load_data("sounds.py:load", workers=n) for n in (0, 2))
    assert torch.equal(epoch(alone, 2)[0], epoch(helped, 2)[0])


def test_random_states_stay_where_they_are(folder: Path) -> None:
    data = load_data("sounds.py:load", workers=0)

    def drawn() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(1))

    def seed() -> None:
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)

    seed()
    expected = drawn()
    seed()
    epoch(data, 0)
    assert drawn() == expected


def test_the_test_split_is_whole_and_in_order(folder: Path) -> None:
    data = load_data("sounds.py:load", workers=0)
    batches = list(data.test_batches(batch_size=16, device="cpu"))
    assert [len(y) for _, y in batches] == [16, 14]
    assert torch.cat([y for _, y in batches]).tolist() == [i % 3 for i in range(30)]
    calibration = list(data.calibration_batches(seed=0, batch_size=16, count=2, device="cpu"))
    assert [len(x) for x, _ in calibration] == [16, 16]


def test_data_dir_goes_to_those_who_ask_for_it(folder: Path) -> None:
    assert load_data("sounds.py:at", data_dir="a/sounds", workers=0).train_size == 96
    assert load_data("sounds.py:load", data_dir="a/sounds", workers=0).train_size == 96


def test_tokens(folder: Path) -> None:
    data = load_data("sounds:tokens", workers=0)
    assert data.num_classes == 3
    assert data.blank.dtype == torch.int64
    x, y = epoch(data, 0)
    assert torch.equal(x[:, 0], y)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("sound.py:load", {}, r"data 'sound\.py:load': no such file"),
        ("sounds.py:laod", {}, r"'laod' is not in the file; did you mean load\?"),
        ("sounds.py:load", {"cuont": 3}, r"unknown option 'cuont' for data 'sounds\.py:load'; did you mean count\?"),
        ("sounds.py:at", {}, r"fails|cannot be made \(AttributeError: .*sounds\.py, line \d+\)"),
        ("sounds.py:load", {"workers": -1}, r"workers is -1, accepted is a number from 0"),
        ("sounds.py:breaks", {}, r"cannot be made \(TypeError: .*sounds\.py, line \d+\)"),
        ("sounds.py:one", {}, r"returned a Sounds; use a function that returns two torch datasets"),
        ("sounds.py:empty", {}, r"the test set is empty"),
        ("sounds.py:nameless", {}, r"how many classes\?"),
        ("sounds.py:changed", {"kind": "text"}, r"train sample 0 has label 'low'"),
        ("sounds.py:changed", {"kind": "half"}, r"train sample 0 has label 0\.5"),
        ("sounds.py:changed", {"kind": "bytes"}, r"train sample 0 is torch\.uint8; accepted is .*float32"),
        ("sounds.py:changed", {"kind": "alone"}, r"train sample 0 is a Tensor; accepted is \(tensor, label\)"),
        ("sounds.py:changed", {"kind": "object"}, r"train sample 0 begins with a object"),
        ("sounds.py:changed", {"kind": "raises"}, r"train sample 0 cannot be read \(IndexError: .*sounds\.py, line"),
    ],
)
def test_what_is_wrong_with_it_in_one_line(folder: Path, name: str, options: dict, message: str) -> None:
    with pytest.raises(BitwrightError, match=message) as caught:
        load_data(name, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            "shape",
            r"train sample 3 is torch\.float32 of shape \(1, 41\), the first one .* of shape \(1, 40\)",
        ),
        ("label", r"train sample 3 has label 3; accepted are 0 to 2"),
        ("later", r"train sample [1-7] cannot be read \(IndexError: "),
    ],
)
def test_a_bad_sample_in_the_middle_is_one_line(folder: Path, kind: str, message: str, workers: int) -> None:
    data = load_data("sounds.py:changed", kind=kind, workers=workers)
    with pytest.raises(BitwrightError, match=message) as caught:
        list(data.train_batches(epoch=0, seed=0, batch_size=8, device="cpu"))
    assert "\n" not in str(caught.value)


OVERRIDES = ("data={name: 'sounds.py:load', options: {workers: 0}}", "model={name: 'tones.py:net'}", "ends=4")


def test_a_training_that_is_stopped_goes_on_as_if_it_had_not_been(folder: Path) -> None:
    given = (*OVERRIDES, "schedule={epochs: 4, batch_size: 16}", "calibration={samples: 32, batch_size: 16}")
    whole = train(folder / "whole", *given)
    assert whole["accuracy"] > 0.6
    with pytest.raises(Interrupted):
        train(folder / "parts", *given, stop=StopAfter(9))
    resume(folder / "parts")
    states = [load_checkpoint(folder / part / "run" / "checkpoint.pt")["model"] for part in ("whole", "parts")]
    assert all(torch.equal(v, states[1][k]) for k, v in states[0].items())


def test_a_layout_for_images_is_refused(folder: Path) -> None:
    with pytest.raises(BitwrightError, match=r"channels_last: true is not accepted; .*have shape \(1, 40\)"):
        train(folder / "last", *OVERRIDES, "channels_last=true")
