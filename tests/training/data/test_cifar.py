import dataclasses
import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from bitwright.errors import BitwrightError
from bitwright.training.data import load_data, sources
from bitwright.training.data.cifar import CIFAR10, CIFAR100, Layout, cifar

TINY = {layout.name: dataclasses.replace(layout, train_records=4, test_records=3) for layout in (CIFAR10, CIFAR100)}
both = pytest.mark.parametrize("layout", TINY.values(), ids=TINY.keys())


@pytest.fixture(autouse=True)
def _no_system_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "SYSTEM_FOLDER", tmp_path / "system")
    (tmp_path / "data").mkdir()


def contents(layout: Layout) -> dict[str, bytes]:
    random = np.random.default_rng(1)
    counts = dict.fromkeys(layout.train_files, layout.train_records) | {layout.test_file: layout.test_records}
    files = {}
    for name, count in counts.items():
        records = random.integers(0, 256, (count, layout.label_bytes + 3072), np.uint8)
        records[:, : layout.label_bytes] = random.integers(0, 10, (count, layout.label_bytes))
        files[name] = records.tobytes()
    return files


def write(folder: Path, layout: Layout) -> dict[str, bytes]:
    folder.mkdir(parents=True, exist_ok=True)
    files = contents(layout)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return files


def write_archive(path: Path, layout: Layout, files: dict[str, bytes], prefix: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as archive:
        for name, content in {"readme.html": b"<html>", **files}.items():
            member = tarfile.TarInfo(f"{prefix}{layout.folder}/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def load(layout: Layout, tmp_path: Path, **options):
    return cifar(layout, data_dir=tmp_path / "data", cache=tmp_path / "cache", download=False, **options)


def check(data, layout: Layout, files: dict[str, bytes]) -> None:
    """Every pixel by its documented place: plane c of 1,024 bytes, row-major, after the label bytes."""
    record = layout.label_bytes + 3072
    train = b"".join(files[name] for name in layout.train_files)
    for images, labels, content in (
        (data.train_images, data.train_labels, train),
        (data.test_images, data.test_labels, files[layout.test_file]),
    ):
        assert len(images) == len(labels) == len(content) // record
        assert labels.dtype == torch.int64
        for i in range(len(images)):
            assert labels[i] == content[i * record + layout.label_bytes - 1]
            for c, y, x in ((0, 0, 0), (1, 2, 3), (2, 31, 31), (0, 31, 0)):
                assert images[i, c, y, x] == content[i * record + layout.label_bytes + 1024 * c + 32 * y + x]


@both
@pytest.mark.parametrize("where", ["data", "data/{folder}", "system/{name}", "cache/{name}/{folder}"])
def test_every_place(layout: Layout, where: str, tmp_path: Path) -> None:
    files = write(tmp_path / where.format(folder=layout.folder, name=layout.name), layout)
    data = load(layout, tmp_path)
    check(data, layout, files)
    assert (data.num_classes, data.in_channels, data.image_size) == (layout.num_classes, 3, 32)
    assert (data.padding, data.flip, data.mean, data.std) == (4, True, layout.mean, layout.std)


@both
@pytest.mark.parametrize("where", ["data", "cache/{name}"])
@pytest.mark.parametrize("prefix", ["", "./"])
def test_the_archive_is_read_in_memory(layout: Layout, where: str, prefix: str, tmp_path: Path) -> None:
    files = contents(layout)
    path = tmp_path / where.format(name=layout.name) / layout.remote.name
    write_archive(path, layout, dict(sorted(files.items())), prefix)
    check(load(layout, tmp_path), layout, files)
    assert list(path.parent.iterdir()) == [path]


def test_options(tmp_path: Path) -> None:
    layout = TINY["cifar10"]
    write(tmp_path / "data", layout)
    data = load(layout, tmp_path, subset=7, augment=False, mean=[0, 0, 0], std=[1, 1, 1])
    assert (data.train_size, data.padding, data.flip, data.mean) == (7, 0, False, (0.0, 0.0, 0.0))


@both
def test_missing(layout: Layout, tmp_path: Path) -> None:
    with pytest.raises(BitwrightError) as caught:
        load(layout, tmp_path)
    for part in ("data", f"system/{layout.name}", f"cache/{layout.name}"):
        assert str(tmp_path / part) in str(caught.value)
    assert f"get {layout.remote.name} from https://www.cs.toronto.edu" in str(caught.value)


@both
def test_damaged_files_are_named_with_both_sizes(layout: Layout, tmp_path: Path) -> None:
    files = write(tmp_path / "data", layout)
    for name, content in files.items():
        path = tmp_path / "data" / name
        for broken in (content[:-1], content + b"x", content[: -(3072 + layout.label_bytes)], b""):
            path.write_bytes(broken)
            expected = rf"{path}: damaged, expected {len(content)} bytes, found {len(broken)}"
            with pytest.raises(BitwrightError, match=expected):
                load(layout, tmp_path)
        path.write_bytes(content)
    (tmp_path / "data" / layout.test_file).unlink()
    with pytest.raises(BitwrightError, match=rf"{layout.test_file}: cannot be read \(No such file"):
        load(layout, tmp_path)


@both
def test_damaged_archives(layout: Layout, tmp_path: Path) -> None:
    files = contents(layout)
    path = tmp_path / "data" / layout.remote.name
    write_archive(path, layout, files)
    whole = path.read_bytes()
    for broken in (b"", b"junk" * 100, whole[: len(whole) // 2], whole[: len(whole) // 3] + bytes(len(whole) // 2)):
        path.write_bytes(broken)
        with pytest.raises(BitwrightError, match=rf"{path}: (cannot be read|holds no {layout.folder}/)"):
            load(layout, tmp_path)
    write_archive(path, layout, {k: v for k, v in files.items() if k != layout.test_file})
    with pytest.raises(BitwrightError, match=rf"{path}: holds no {layout.folder}/{layout.test_file}"):
        load(layout, tmp_path)
    write_archive(path, layout, files | {layout.test_file: b"short"})
    with pytest.raises(BitwrightError, match=rf"{path}: .*{layout.test_file} is damaged, expected \d+ bytes, found 5"):
        load(layout, tmp_path)


@both
def test_labels_outside_the_classes(layout: Layout, tmp_path: Path) -> None:
    files = write(tmp_path / "data", layout)
    content = bytearray(files[layout.test_file])
    content[layout.label_bytes - 1] = layout.num_classes
    (tmp_path / "data" / layout.test_file).write_bytes(content)
    message = rf"{layout.test_file}: label {layout.num_classes}, accepted are 0 to {layout.num_classes - 1}"
    with pytest.raises(BitwrightError, match=message):
        load(layout, tmp_path)


@both
def test_the_pickled_version_is_refused_with_the_file_to_get(layout: Layout, tmp_path: Path) -> None:
    for name in layout.pickles:
        path = tmp_path / "data" / name
        path.write_bytes(b"cos\nsystem\n(S'false'\ntR.")
        with pytest.raises(BitwrightError) as caught:
            load(layout, tmp_path)
        assert str(caught.value) == (
            f"{path}: the python version of {layout.name} is a pickle and is not opened; "
            f"get the binary version, {layout.remote.url}"
        )
        assert layout.remote.url.endswith("-binary.tar.gz")
        path.unlink()
    (tmp_path / "data" / layout.pickles[1]).mkdir()
    write(tmp_path / "data", layout)
    assert load(layout, tmp_path).train_size == 4 * len(layout.train_files)


def test_downloads_into_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = TINY["cifar100"]
    files = contents(layout)
    monkeypatch.setattr(sources, "fetch", lambda file, target: write_archive(target, layout, files))
    check(cifar(layout, cache=tmp_path / "cache"), layout, files)
    monkeypatch.setattr(sources, "fetch", lambda *_: pytest.fail("downloaded twice"))
    check(cifar(layout, cache=tmp_path / "cache"), layout, files)


@pytest.mark.slow
@pytest.mark.skipif(
    "BITWRIGHT_CIFAR10" not in os.environ, reason="BITWRIGHT_CIFAR10=FOLDER with the .bin files is unset"
)
def test_the_real_set() -> None:
    data = load_data("cifar10", data_dir=os.environ["BITWRIGHT_CIFAR10"], download=False)
    assert (data.train_size, data.test_size) == (50000, 10000)
    images, labels = zip(*data.test_batches(batch_size=1000, device="cpu"), strict=True)
    assert torch.cat(labels).bincount().tolist() == [1000] * 10
    assert torch.cat(images).mean((0, 2, 3)).abs().max() < 0.05
    assert (torch.cat(images).std((0, 2, 3)) - 1).abs().max() < 0.02


@both
def test_smaller_images_are_means_of_squares(layout: Layout, tmp_path: Path) -> None:
    write(tmp_path / "data", layout)
    whole = load(layout, tmp_path)
    for size in (16, 8):
        small = load(layout, tmp_path, image_size=size)
        square = 32 // size
        for split in ("train_images", "test_images"):
            images = getattr(whole, split).numpy().astype(np.float64)
            n = len(images)
            means = images.reshape(n, 3, size, square, size, square).mean((3, 5))
            assert np.array_equal(getattr(small, split).numpy(), np.rint(means).astype(np.uint8))
        assert (small.image_size, small.padding) == (size, size // 8)
        assert torch.equal(small.train_labels, whole.train_labels)


def test_an_image_size_that_is_no_divisor_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BitwrightError, match="image_size is 20, accepted are 32, 16, 8"):
        load(TINY["cifar10"], tmp_path, image_size=20)
