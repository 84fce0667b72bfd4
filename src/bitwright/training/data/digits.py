"""scikit-learn's handwritten digits: 1,797 gray 8×8 images inside the package, no download."""

import torch
from sklearn.datasets import load_digits

from bitwright.training.data.dataset import check_statistics, stratified, take_subset
from bitwright.training.data.memory import MemoryDataset

TEST_SIZE = 500
MEAN, STD = (0.3061,), (0.3764,)  # of the 1,297 training images


def digits(*, subset: int | None = None, augment: bool = True, mean: object = MEAN, std: object = STD) -> MemoryDataset:
    """The digits, 10 classes, 1×8×8, split once for all into 1,297 training and 500 test images by class.

    The set has no official split of single images, hence a fixed one. Its 17 gray levels are spread over 0 … 255.
    augment: shift by up to one pixel each way; digits are not mirrored.
    """
    rows, target = load_digits(return_X_y=True)
    pixels = (torch.as_tensor(rows) * (255 / 16)).round().to(torch.uint8).view(-1, 1, 8, 8)
    labels = torch.as_tensor(target).long()
    is_test = torch.zeros(len(labels), dtype=torch.bool)
    is_test[stratified(labels, TEST_SIZE, seed=0)] = True
    train, test = (~is_test).nonzero()[:, 0], is_test.nonzero()[:, 0]
    train = train[take_subset(labels[train], subset, "digits")]
    mean_, std_ = check_statistics(mean, std, 1, "digits")
    return MemoryDataset(
        name="digits",
        num_classes=10,
        train_images=pixels[train],
        train_labels=labels[train],
        test_images=pixels[test],
        test_labels=labels[test],
        mean=mean_,
        std=std_,
        padding=int(augment),
        flip=False,
    )
