import pytest

from bitwright.errors import BitwrightError
from bitwright.training.lookup import check_options, close_matches, first_line


def test_near_names_are_suggested_and_far_ones_listed() -> None:
    known = ["resnet8", "resnet20", "vgg_small"]
    assert close_matches("resnet2", known) == "did you mean resnet20, resnet8?"
    assert close_matches("zzz", known) == "accepted: resnet20, resnet8, vgg_small"
    assert close_matches("zzz", map(str, range(10, 40))) == "accepted: 30 names, among them 10, 11, 12, 13, 14"


def test_first_line_always_says_something() -> None:
    assert first_line(ValueError("one\ntwo")) == "one"
    assert first_line(EOFError()) == "EOFError"
    assert first_line(KeyError(5)) == "KeyError: 5"


def test_options_are_the_keyword_only_parameters() -> None:
    def function(positional: int, *, width: int = 1) -> None: ...

    def none(positional: int) -> None: ...

    check_options(function, {"width": 2}, "model 'a'")
    with pytest.raises(BitwrightError, match=r"unknown option 'widht' for model 'a'; did you mean width\?"):
        check_options(function, {"widht": 2}, "model 'a'")
    with pytest.raises(BitwrightError, match="unknown option 'positional' for model 'a'"):
        check_options(function, {"positional": 2}, "model 'a'")
    with pytest.raises(BitwrightError, match="unknown option 'x' for model 'b'; it takes none"):
        check_options(none, {"x": 2}, "model 'b'")


def test_an_option_that_is_a_switch_takes_no_words() -> None:
    def load(*, augment: bool = True) -> None: ...

    check_options(load, {"augment": False}, "data 'x'")
    with pytest.raises(BitwrightError, match="data 'x': augment='none' is not accepted; use true or false"):
        check_options(load, {"augment": "none"}, "data 'x'")
