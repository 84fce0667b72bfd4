import pytest

from bitwright import BitwrightError
from bitwright.costs import parse_budget


def test_amounts_are_numbers_or_text_with_a_unit():
    assert parse_budget({"bitops": "0.51G", "size": "120KB"}, "adaqat") == {"bitops": 0.51e9, "size": 120e3}
    assert parse_budget({"bitops": "0.5e9", "size": "1.5 MiB"}, "adaqat") == {"bitops": 0.5e9, "size": 1.5 * 1024**2}
    assert parse_budget({"bitops": 5, "size": "64 B"}, "adaqat") == {"bitops": 5.0, "size": 64.0}
    assert parse_budget({"latency": "5ms"}, "amed") == parse_budget({"latency": 5}, "amed") == {"latency": 5.0}
    assert parse_budget({"latency": "0.5 s"}, "amed") == {"latency": 500.0}
    assert parse_budget({"latency": "800us"}, "amed") == {"latency": 0.8}
    assert parse_budget(None, "adaqat") == {}


@pytest.mark.parametrize(
    "budget",
    [
        {"joules": 1},
        {"size": 0},
        {"size": "-4KB"},
        {"bitops": "many"},
        {"size": "3XB"},
        {"size": "5ms"},
        {"latency": "5G"},
    ],
)
def test_other_amounts_are_refused(budget):
    with pytest.raises(BitwrightError, match="adaqat: budget") as caught:
        parse_budget(budget, "adaqat")
    assert "\n" not in str(caught.value)
