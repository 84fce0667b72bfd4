import pytest

from bitwright import BitwrightError
from bitwright.costs import parse_budget


def test_amounts_are_numbers_or_text_with_a_unit():
    assert parse_budget({"bitops": "0.51G", "size": "120KB"}, "adaqat") == {"bitops": 0.51e9, "size": 120e3}
    assert parse_budget({"bitops": "0.5e9", "size": "1.5 MiB"}, "adaqat") == {"bitops": 0.5e9, "size": 1.5 * 1024**2}
    assert parse_budget({"bitops": 5, "size": "64 B"}, "adaqat") == {"bitops": 5.0, "size": 64.0}
    assert parse_budget(None, "adaqat") == {}


@pytest.mark.parametrize("budget", [{"latency": 1}, {"size": 0}, {"size": "-4KB"}, {"bitops": "many"}, {"size": "3XB"}])
def test_other_amounts_are_refused(budget):
    with pytest.raises(BitwrightError, match="adaqat: budget") as caught:
        parse_budget(budget, "adaqat")
    assert "\n" not in str(caught.value)
