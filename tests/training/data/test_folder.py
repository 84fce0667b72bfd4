import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from bitwright.errors import BitwrightError
from bitwright.training.data import load_data, sources
from bitwright.training.data.dataset import epoch_order
from bitwright.training.data.folder import FolderDataset
from bitwright.training.data.pictures import open_picture, plain_pixels, train_pixels

Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """train: 5 + 4 + 3, val: 2 + 2 + 2 pictures of different sizes and formats, and files that are none."""
    monkeypatch.setattr(sources, "SYSTEM_FOLDER", tmp_path / "system")
    rng = np.random.default_rng(0)
    folder = tmp_path / "data"
    for split, counts in (("train", (5, 4, 3)), ("val", (2, 2, 2))):
        for name, count in zip(("cat", "ant", "bee"), counts, strict=True):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (20 + 3 * i, 26 - i, 3), np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{i}.{('png', 'JPEG')[i % 2]}")
            (folder / split / name / "notes.txt").write_text("")
            (folder / split / name / ".hidden.png").write_text("")
    (folder / "train" / ".cache").mkdir()
    return folder


def load(root: Path, **options) -> FolderDataset:
    options = {"image_size": 16, "resize": 18, "workers": 0} | options
    data = load_data("imagefolder", data_dir=root, cache=root.parent / "cache", **options)
    assert isinstance(data, FolderDataset)
    return data


def by_hand(views: list[np.ndarray]) -> Tensor:
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return (torch.tensor(np.stack(views)).permute(0, 3, 1, 2).float() / 255 - mean) / std


def same(first: list, second: list) -> bool:
    assert len(first) == len(second)
    return all(torch.equal(x, a) and torch.equal(y, b) for (x, y), (a, b) in zip(first, second, strict=True))


def test_classes_and_files_in_the_order_of_their_names(root: Path) -> None:
    data = load(root)
    assert (data.num_classes, data.in_channels, data.image_size) == (3, 3, 16)
    assert (data.train_size, data.test_size) == (12, 6)
    assert data.train.labels.tolist() == [0] * 4 + [1] * 3 + [2] * 5
    assert [str(p.relative_to(root)) for p in data.test.paths] == [
        f"val/{name}/{file}" for name in ("ant", "bee", "cat") for file in ("0.png", "1.JPEG")
    ]


@pytest.mark.parametrize("workers", [0, 2])
def test_test_images_come_whole_in_order_and_plain(root: Path, workers: int) -> None:
    data = load(root, workers=workers)
    batches = list(data.test_batches(batch_size=4, device="cpu"))
    assert [len(y) for _, y in batches] == [4, 2]
    views = [plain_pixels(open_picture(p), 16, 18) for p in data.test.paths]
    assert torch.equal(torch.cat([x for x, _ in batches]), by_hand(views))
    assert torch.cat([y for _, y in batches]).tolist() == [0, 0, 1, 1, 2, 2]


def test_training_images_are_drawn_by_seed_epoch_and_sample(root: Path) -> None:
    data = load(root)
    order = epoch_order(12, seed=3, epoch=1).tolist()
    views = [train_pixels(open_picture(data.train.paths[i]), 16, random.Random(repr((3, 1, i)))) for i in order]
    batches = list(data.train_batches(epoch=1, seed=3, batch_size=5, device="cpu"))
    assert [x.shape for x, _ in batches] == [(5, 3, 16, 16)] * 2 == [(5, 3, 16, 16)] * data.steps_per_epoch(5)
    assert torch.equal(torch.cat([x for x, _ in batches]), by_hand(views[:10]))
    assert torch.cat([y for _, y in batches]).tolist() == data.train.labels[order[:10]].tolist()


def test_workers_and_a_start_in_the_middle_change_nothing(root: Path) -> None:
    arguments = {"epoch": 2, "seed": 0, "batch_size": 3, "device": "cpu"}
    whole = list(load(root).train_batches(**arguments))
    assert len(whole) == 4
    assert same(whole, list(load(root, workers=2).train_batches(**arguments)))
    for start in range(5):
        assert same(whole[start:], list(load(root).train_batches(**arguments, start=start)))
    assert same(whole[2:], list(load(root, workers=2).train_batches(**arguments, start=2)))
    assert not same(whole, list(load(root).train_batches(**arguments | {"epoch": 3})))
    assert not same(whole, list(load(root).train_batches(**arguments | {"seed": 1})))


@pytest.mark.parametrize("workers", [0, 2])
def test_the_global_random_state_is_neither_read_nor_moved(root: Path, workers: int) -> None:
    data = load(root, workers=workers)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = list(data.train_batches(epoch=0, seed=0, batch_size=6, device="cpu"))
    list(data.test_batches(batch_size=6, device="cpu"))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    random.seed(2)
    assert same(first, list(data.train_batches(epoch=0, seed=0, batch_size=6, device="cpu")))


def test_without_augmentation_and_calibration_are_the_plain_pixels(root: Path) -> None:
    data = load(root, augment=False)
    views = by_hand([plain_pixels(open_picture(p), 16, 18) for p in data.train.paths])
    (x, _), *_ = data.train_batches(epoch=0, seed=0, batch_size=12, device="cpu")
    assert torch.equal(x, views[epoch_order(12, seed=0, epoch=0)])
    batches = list(load(root).calibration_batches(seed=0, batch_size=5, count=2, device="cpu"))
    found = torch.cat([x for x, _ in batches])
    assert len(found) == 10
    places = [(views == image).flatten(1).all(1).nonzero().item() for image in found]
    assert len(set(places)) == 10
    assert torch.cat([y for _, y in batches]).tolist() == data.train.labels[places].tolist()


def test_options(root: Path) -> None:
    data = load(root, subset=6, mean=[0, 0, 0], std=[1, 1, 1])
    assert data.train.labels.bincount().tolist() in ([2, 1, 3], [2, 2, 2])
    assert data.mean == (0.0, 0.0, 0.0)
    default = load_data("imagenet", data_dir=root)
    assert isinstance(default, FolderDataset)
    assert (default.name, default.image_size, default.resize) == ("imagenet", 224, 256)
    for option, value in (("image_size", 0), ("resize", 15), ("workers", -1), ("workers", "two")):
        with pytest.raises(BitwrightError, match=rf"data 'imagefolder': {option} is {value!r}, accepted is a number"):
            load(root, **{option: value})


def test_missing(root: Path) -> None:
    with pytest.raises(BitwrightError) as caught:
        load_data("imagefolder", data_dir=root / "train", cache=root / "cache")
    for place in (root / "train", root.parent / "system" / "imagefolder", root / "cache" / "imagefolder"):
        assert str(place) in str(caught.value)
    assert "train/<class>/* and val/<class>/*" in str(caught.value)


def test_class_folders_that_differ(root: Path) -> None:
    (root / "val" / "bee").rename(root / "val" / "wasp")
    with pytest.raises(BitwrightError, match=r"differ, 'bee' is in train and not in val \(2 such\)"):
        load(root)
    (root / "train" / "bee").rename(root / "train" / "wasp")
    (root / "val" / "zebra").mkdir()
    with pytest.raises(BitwrightError, match=r"differ, 'zebra' is in val and not in train \(1 such\)"):
        load(root)


def test_empty_folders(root: Path) -> None:
    for path in (root / "val" / "bee").iterdir():
        if path.suffix != ".txt":
            path.unlink()
    with pytest.raises(BitwrightError, match=rf"{root}/val/bee: holds no images \(\.bmp, "):
        load(root)
    (root / "val").rename(root / "test")
    with pytest.raises(BitwrightError, match=rf"{root}/val: cannot be read \(No such file"):
        load(root)
    (root / "val").mkdir()
    with pytest.raises(BitwrightError, match=rf"{root}/val: holds no class folders"):
        load(root)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_is_one_line_from_any_process(root: Path, workers: int) -> None:
    path = root / "train" / "bee" / "1.JPEG"
    path.write_bytes(path.read_bytes()[:200])
    data = load(root, workers=workers)
    with pytest.raises(BitwrightError) as caught:
        list(data.train_batches(epoch=0, seed=0, batch_size=12, device="cpu"))
    assert str(caught.value).startswith(f"{path}: not a readable image (")
    assert "\n" not in str(caught.value)
