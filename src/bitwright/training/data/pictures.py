"""One picture file at a time: decode, crop, resize, mirror. Pillow only; draws come from the caller."""

import math
import random
from pathlib import Path
from typing import Any

import numpy as np

from bitwright.errors import BitwrightError

SCALE = (0.08, 1.0)  # share of the picture's area that a training crop keeps
RATIO = (3 / 4, 4 / 3)  # its width over its height
Box = tuple[int, int, int, int]  # left, upper, right, lower


def import_pillow() -> Any:
    """The PIL.Image module. Raises: BitwrightError where Pillow is not installed."""
    try:
        from PIL import Image
    except ModuleNotFoundError as error:
        raise BitwrightError('Pillow is not installed: pip install "bitwright[vision]"') from error
    return Image


def open_picture(path: Path) -> Any:
    """The picture as RGB. Raises: BitwrightError naming the file that cannot be decoded."""
    image = import_pillow()
    try:
        with image.open(path) as picture:
            return picture.convert("RGB")
    except (OSError, SyntaxError, ValueError, image.DecompressionBombError) as error:
        raise BitwrightError(f"{path}: not a readable image ({error})") from error


def train_box(width: int, height: int, draw: random.Random) -> Box:
    """A random crop (Szegedy et al. 2015): area uniform in `SCALE`, log of the aspect ratio uniform in `RATIO`.

    After ten draws that do not fit, the largest centred crop whose ratio is inside `RATIO`.
    """
    for _ in range(10):
        area = width * height * draw.uniform(*SCALE)
        ratio = math.exp(draw.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = draw.randint(0, width - w), draw.randint(0, height - h)
            return left, top, left + w, top + h
    w = min(width, max(1, round(height * RATIO[1])))
    h = min(height, max(1, round(width / RATIO[0])))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def train_pixels(picture: Any, size: int, draw: random.Random) -> np.ndarray:
    """`train_box` resized to `size`, mirrored half of the time; (size, size, 3) uint8."""
    image = import_pillow()
    box = train_box(picture.width, picture.height, draw)
    picture = picture.crop(box).resize((size, size), image.Resampling.BILINEAR)
    if draw.random() < 0.5:
        picture = picture.transpose(image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(picture)


def plain_pixels(picture: Any, size: int, resize: int) -> np.ndarray:
    """The shorter side resized to `resize`, then the centre cropped to `size`; (size, size, 3) uint8."""
    image = import_pillow()
    shorter = min(picture.width, picture.height)
    width, height = (max(resize, side * resize // shorter) for side in (picture.width, picture.height))
    picture = picture.resize((width, height), image.Resampling.BILINEAR)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return np.asarray(picture.crop((left, top, left + size, top + size)))
