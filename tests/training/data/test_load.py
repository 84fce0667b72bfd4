import pytest

from bitwright.errors import BitwrightError
from bitwright.training.data import DATA, load_data


def test_unknown_names_and_options() -> None:
    with pytest.raises(BitwrightError, match=r"unknown data 'cifar-10'; did you mean cifar10, cifar100\?"):
        load_data("cifar-10")
    with pytest.raises(BitwrightError, match=r"unknown data 'xyz'; accepted: FILE\.py:NAME, cifar10, .*imagenet"):
        load_data("xyz")
    for name in DATA:
        with pytest.raises(BitwrightError, match=rf"unknown option 'subsett' for data '{name}'; did you mean subset\?"):
            load_data(name, subsett=3)
