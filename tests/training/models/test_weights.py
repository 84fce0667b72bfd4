import pickle
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from bitwright.errors import BitwrightError
from bitwright.training.models.weights import load_weights, read_weights


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s, "epoch": 3}, lambda s: {"model": s}])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_torch_files_in_the_usual_wrappings(wrap, prefix: str, tmp_path: Path) -> None:
    source, target = net(), net()
    torch.save(wrap({prefix + k: v for k, v in source.state_dict().items()}), tmp_path / "a.pt")
    load_weights(target, read_weights(tmp_path / "a.pt"), "a.pt")
    assert all(torch.equal(a, b) for a, b in zip(source.parameters(), target.parameters(), strict=True))


def test_safetensors_files(tmp_path: Path) -> None:
    source = net()
    safetensors.torch.save_file(source.state_dict(), tmp_path / "a.safetensors")
    state = read_weights(str(tmp_path / "a.safetensors"))
    assert all(torch.equal(state[k], v) for k, v in source.state_dict().items())


def test_nothing_in_a_file_is_executed(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "owned",))

    (tmp_path / "evil.pt").write_bytes(pickle.dumps({"w": Evil()}))
    torch.save({"w": Evil()}, tmp_path / "evil2.pt")
    for name in ("evil.pt", "evil2.pt"):
        with pytest.raises(BitwrightError, match=rf"{name}: not a readable checkpoint of weights"):
            read_weights(tmp_path / name)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_truncated_at_any_place_is_one_line(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{suffix}"
    state = net().state_dict()
    safetensors.torch.save_file(state, path) if suffix == "safetensors" else torch.save(state, path)
    content = path.read_bytes()
    for size in (0, 1, 7, 9, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(BitwrightError, match=rf"a\.{suffix}: not a readable") as caught:
            read_weights(path)
        assert "\n" not in str(caught.value)


def test_missing_file_and_wrong_content(tmp_path: Path) -> None:
    with pytest.raises(BitwrightError, match=r"b\.pt: no such checkpoint file"):
        read_weights(tmp_path / "b.pt")
    for content in ([torch.zeros(1)], {"a": 3}, torch.zeros(2)):
        torch.save(content, tmp_path / "c.pt")
        with pytest.raises(BitwrightError, match=r"c\.pt: holds no state dict"):
            read_weights(tmp_path / "c.pt")


def test_what_does_not_fit_is_named_and_changes_nothing() -> None:
    model = net()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = {k: v + 1 for k, v in before.items()}
    del state["0.bias"]
    state["1.weight"] = torch.zeros(1, 4)
    state |= {f"extra{i}": torch.zeros(1) for i in range(5)}
    with pytest.raises(BitwrightError) as caught:
        load_weights(model, state, "f.pt")
    assert str(caught.value) == (
        "f.pt does not fit the model (missing: 0.bias; unknown: extra0, extra1, extra2 and 2 more; "
        "shape: 1.weight is (1, 4), the model's is (1, 3))"
    )
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
