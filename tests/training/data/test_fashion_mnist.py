import dataclasses
import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from bitwright.errors import BitwrightError
from bitwright.training.data import load_data, sources
from bitwright.training.data.fashion_mnist import FILES, IdxFile, fashion_mnist, read_idx

TINY = {
    key: dataclasses.replace(file, shape=(12 if key.startswith("train") else 5, *file.shape[1:]))
    for key, file in FILES.items()
}


@pytest.fixture(autouse=True)
def _no_system_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "SYSTEM_FOLDER", tmp_path / "system")


def arrays() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {k: random.integers(0, 10 if "labels" in k else 256, f.shape, np.uint8) for k, f in TINY.items()}


def write(folder: Path, *, packed: bool) -> dict[str, np.ndarray]:
    folder.mkdir(parents=True, exist_ok=True)
    found = arrays()
    for key, file in TINY.items():
        content = struct.pack(f">HBB{len(file.shape)}I", 0, 8, len(file.shape), *file.shape) + found[key].tobytes()
        path = folder / (f"{file.name}.gz" if packed else file.name)
        path.write_bytes(gzip.compress(content) if packed else content)
    return found


def load(tmp_path: Path, **options):
    return fashion_mnist(TINY, data_dir=tmp_path / "data", cache=tmp_path / "cache", download=False, **options)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(
    "where", ["data", "data/fashion-mnist", "data/FashionMNIST/raw", "system/fashion-mnist", "cache/fashion-mnist"]
)
def test_every_place_and_both_forms(where: str, packed: bool, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    expected = write(tmp_path / where, packed=packed)
    data = load(tmp_path)
    assert data.train_images.tolist() == expected["train_images"][:, None].tolist()
    assert data.train_labels.tolist() == expected["train_labels"].tolist()
    assert data.test_images.tolist() == expected["test_images"][:, None].tolist()
    assert data.test_labels.tolist() == expected["test_labels"].tolist()
    assert data.train_labels.dtype == data.test_labels.dtype == torch.int64
    assert (data.padding, data.flip, data.image_size, data.in_channels) == (2, True, 28, 1)


def test_the_given_folder_comes_first(tmp_path: Path) -> None:
    write(tmp_path / "cache" / "fashion-mnist", packed=True)
    write(tmp_path / "data", packed=False)
    path = tmp_path / "data" / TINY["test_labels"].name
    path.write_bytes(path.read_bytes()[:-5] + bytes([3] * 5))
    assert load(tmp_path).test_labels.tolist() == [3] * 5


def test_options(tmp_path: Path) -> None:
    write(tmp_path / "data", packed=True)
    data = load(tmp_path, augment=False, mean=[0.1], std=[0.2], subset=4)
    assert (data.padding, data.flip, data.mean, data.std, data.train_size) == (0, False, (0.1,), (0.2,), 4)


def test_missing_and_incomplete(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    with pytest.raises(BitwrightError) as caught:
        load(tmp_path)
    message = str(caught.value)
    for place in ("data", "system/fashion-mnist", "cache/fashion-mnist"):
        assert str(tmp_path / place) in message
    assert "downloads are switched off; get the four files from http://fashion-mnist" in message
    write(tmp_path / "data", packed=True)
    (tmp_path / "data" / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(BitwrightError, match="data: incomplete Fashion-MNIST, no t10k-labels-idx1-ubyte or"):
        load(tmp_path)


@pytest.mark.parametrize("packed", [True, False])
def test_damage_names_the_file_and_the_sizes(packed: bool, tmp_path: Path) -> None:
    write(tmp_path / "data", packed=packed)
    name = "train-images-idx3-ubyte"
    path = tmp_path / "data" / (name + ".gz" * packed)
    content = path.read_bytes()
    total = 16 + 12 * 28 * 28
    cut = "cannot be read" if packed else f"damaged, expected {total} bytes .unpacked., found {total // 2}"
    path.write_bytes(content[: total // 2])
    with pytest.raises(BitwrightError, match=rf"{path}: {cut}"):
        load(tmp_path)
    path.write_bytes(gzip.compress(gzip.decompress(content) + b"x") if packed else content + b"x")
    with pytest.raises(BitwrightError, match=rf"{path}: damaged, expected {total} bytes .unpacked., found more"):
        load(tmp_path)


def test_damaged_gzip_streams(tmp_path: Path) -> None:
    write(tmp_path / "data", packed=True)
    path = tmp_path / "data" / "train-labels-idx1-ubyte.gz"
    content = path.read_bytes()
    for broken in (b"", b"not gzip at all", content[:-12] + bytes(12), content[:12] + b"\xff" * 20):
        path.write_bytes(broken)
        with pytest.raises(BitwrightError, match=rf"{path}: (cannot be read|header is)"):
            load(tmp_path)


def test_header_of_another_set(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(struct.pack(">HBBI", 0, 8, 1, 4) + bytes(4))
    assert read_idx(path, (4,)).tolist() == [0] * 4
    with pytest.raises(BitwrightError, match=r"x: header is 0000080100000004, expected 0000080100000005"):
        read_idx(path, (5,))


def test_labels_outside_the_classes(tmp_path: Path) -> None:
    write(tmp_path / "data", packed=False)
    path = tmp_path / "data" / "t10k-labels-idx1-ubyte"
    path.write_bytes(path.read_bytes()[:-1] + b"\x0a")
    with pytest.raises(BitwrightError, match=rf"{path}: label 10, accepted are 0 to 9"):
        load(tmp_path)


def test_a_small_file_that_inflates_to_much_is_not_inflated(tmp_path: Path) -> None:
    path = tmp_path / "bomb.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(struct.pack(">HBBI", 0, 8, 1, 100))
        for _ in range(64):
            file.write(bytes(1 << 20))
    with pytest.raises(BitwrightError, match=r"expected 108 bytes \(unpacked\), found more"):
        read_idx(path, (100,))


def test_downloads_into_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fetch(file: sources.Remote, target: Path) -> None:
        asked.append((file.url, target.parent))
        write(target.parent, packed=True)

    monkeypatch.setattr(sources, "fetch", fetch)
    data = fashion_mnist(TINY, cache=tmp_path / "cache")
    assert data.train_size == 12
    assert asked[0] == (FILES["train_images"].remote.url, tmp_path / "cache" / "fashion-mnist")


@pytest.mark.skipif(
    not Path("/usr/share/datasets/fashion-mnist").is_dir(), reason="Debian's dataset-fashion-mnist is not installed"
)
def test_the_real_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "SYSTEM_FOLDER", Path("/usr/share/datasets"))
    data = load_data("fashion-mnist", download=False)
    assert (data.train_size, data.test_size) == (60000, 10000)
    images, labels = zip(*data.test_batches(batch_size=1000, device="cpu"), strict=True)
    assert torch.cat(labels).bincount().tolist() == [1000] * 10
    assert abs(torch.cat(images).mean()) < 0.01
    assert abs(torch.cat(images).std() - 1) < 0.01


def test_published_sizes_are_of_gzipped_files() -> None:
    for file in FILES.values():
        assert isinstance(file, IdxFile)
        assert file.remote.size < np.prod(file.shape)
        assert file.remote.url.endswith(f"/{file.name}.gz")
