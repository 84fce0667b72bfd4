import torch
from sklearn.datasets import load_digits

from bitwright.training.data import load_data
from bitwright.training.data.digits import digits


def test_the_split_is_fixed_disjoint_complete_and_by_class() -> None:
    data = digits()
    assert (data.train_size, data.test_size, data.num_classes) == (1297, 500, 10)
    assert (data.in_channels, data.image_size) == (1, 8)
    rows, target = load_digits(return_X_y=True)
    both = torch.cat([data.train_images, data.test_images]).flatten(1)
    labels = torch.cat([data.train_labels, data.test_labels])
    levels = (both.double() * 16 / 255).round().long()
    found = sorted(torch.cat([levels, labels[:, None]], 1).tolist())
    assert found == sorted([*map(int, row), int(label)] for row, label in zip(rows, target, strict=True))
    whole = torch.as_tensor(target).bincount() * 500 / 1797
    assert ((data.test_labels.bincount() - whole).abs() <= 1).all()
    # the very images: a release that moved one between the splits would change every published accuracy
    weights = torch.arange(1, 501)
    assert int((data.test_images.flatten(1).long().sum(1) * weights).sum()) == 617793720


def test_training_images_are_standardised_shifted_and_never_mirrored() -> None:
    data = digits()
    pixels = data.train_images.double() / 255
    assert abs(pixels.mean().item() - data.mean[0]) < 1e-4
    assert abs(pixels.std().item() - data.std[0]) < 1e-4
    assert (data.padding, data.flip) == (1, False)
    assert (digits(augment=False).padding, digits(augment=False).flip) == (0, False)


def test_options() -> None:
    data = load_data("digits", subset=50, mean=[0.5], std=[0.25], data_dir="ignored: the set is inside a package")
    assert data.train_size == 50
    x, _ = next(data.test_batches(batch_size=500, device="cpu"))
    plain, _ = next(digits().test_batches(batch_size=500, device="cpu"))
    torch.testing.assert_close(x, (plain * 0.3764 + 0.3061 - 0.5) / 0.25)
