import math
import random
from pathlib import Path

import numpy as np
import pytest

from bitwright.errors import BitwrightError
from bitwright.training.data import pictures

Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")


@pytest.mark.parametrize("size", [(500, 375), (33, 200), (7, 7), (1, 1), (3000, 2)])
def test_training_crops_lie_inside(size: tuple[int, int]) -> None:
    for seed in range(200):
        left, top, right, bottom = pictures.train_box(*size, random.Random(seed))
        assert 0 <= left < right <= size[0]
        assert 0 <= top < bottom <= size[1]


def test_training_crops_have_the_published_distribution() -> None:
    boxes = np.array([pictures.train_box(1000, 1000, random.Random(seed)) for seed in range(20000)])
    w, h = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    area, ratio = w * h / 1e6, w / h
    assert area.min() >= 0.079
    assert ratio.min() >= 3 / 4 * 0.99
    assert ratio.max() <= 4 / 3 * 1.01
    # below (3/4) of the area every draw fits, so there it is uniform
    counts, _ = np.histogram(area, bins=np.linspace(0.08, 0.74, 7))
    assert np.ptp(counts) / counts.mean() < 0.12
    fits = area < 0.74
    assert abs(np.log(ratio[fits]).mean()) < 0.01
    assert abs(np.log(ratio[fits]).std() - math.log(4 / 3) / math.sqrt(3)) < 0.01


def test_a_picture_too_long_for_any_draw_is_cropped_in_its_centre() -> None:
    assert pictures.train_box(1000, 30, random.Random(0)) == (480, 0, 520, 30)
    assert pictures.train_box(30, 1000, random.Random(0)) == (0, 480, 30, 520)


def test_test_view_is_resized_by_the_shorter_side_and_centred() -> None:
    ramp = np.tile(np.arange(60, dtype=np.uint8) * 4, (30, 1))
    picture = Image.fromarray(np.stack([ramp] * 3, axis=2))
    pixels = pictures.plain_pixels(picture, 20, 30)  # no resize: the centre 20×20 of 60×30
    assert pixels.tolist() == np.stack([ramp[5:25, 20:40]] * 3, axis=2).tolist()
    half = pictures.plain_pixels(picture, 15, 15)
    assert half.shape == (15, 15, 3)
    assert half[7, :, 0].tolist() == [66 + 8 * i for i in range(15)]  # columns 8 … 22 of 30, each 4·(2i + ½)


def test_training_view_is_the_drawn_box_and_mirrored_half_of_the_time() -> None:
    ramp = np.tile(np.arange(128, dtype=np.uint8) * 2, (128, 1))
    picture = Image.fromarray(np.stack([ramp] * 3, axis=2))
    mirrored = 0
    for seed in range(400):
        pixels = pictures.train_pixels(picture, 16, random.Random(seed)).astype(float)
        assert pixels.shape == (16, 16, 3)
        left, _, right, _ = pictures.train_box(128, 128, random.Random(seed))
        centres = 2 * (left + (np.arange(16) + 0.5) * (right - left) / 16 - 0.5)
        row = pixels[8, :, 0]
        flip = row[0] > row[-1]
        mirrored += flip
        assert np.abs((row[::-1] if flip else row)[1:-1] - centres[1:-1]).max() < 2
    assert 160 < mirrored < 240


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "I;16"])
def test_every_mode_becomes_rgb(mode: str, tmp_path: Path) -> None:
    Image.new(mode, (4, 3)).save(tmp_path / "x.png")
    assert pictures.open_picture(tmp_path / "x.png").mode == "RGB"


def test_what_is_not_an_image_is_named(tmp_path: Path) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(tmp_path / "a.jpg")
    content = (tmp_path / "a.jpg").read_bytes()
    for broken in (b"", b"not an image", content[: len(content) // 2]):
        (tmp_path / "a.jpg").write_bytes(broken)
        with pytest.raises(BitwrightError, match=r"a\.jpg: not a readable image"):
            pictures.open_picture(tmp_path / "a.jpg")
    with pytest.raises(BitwrightError, match=r"b\.jpg: not a readable image"):
        pictures.open_picture(tmp_path / "b.jpg")
