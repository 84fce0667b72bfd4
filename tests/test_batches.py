"""What a batch may be."""

from collections import UserDict, namedtuple

import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import bitwright as bw
from bitwright.batches import each_batch, example_of, inputs_of, one_tensor, outputs_of
from bitwright.costs import cost_table
from bitwright.deploy.probe import fed
from bitwright.errors import BitwrightError


class Two(nn.Module):
    """Reads two tensors, by position or by name."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, left: Tensor, right: Tensor, scale: float = 1.0) -> Tensor:
        return self.c(torch.relu(self.a(left) + self.b(right) * scale))


def plain() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(4 * 16, 5))


def scales(model: nn.Module) -> list[Tensor]:
    return [q.affine(torch.zeros(1)).scale for q in bw.quantizers(model).values() if q.shape.role == "input"]


IMAGES = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "batches",
    [
        [IMAGES],
        IMAGES,
        IMAGES.numpy(),
        [IMAGES.numpy()],
        [(IMAGES, torch.zeros(8))],
        [[IMAGES, torch.zeros(8), "more"]],
        [{"input": IMAGES}],
        {"input": IMAGES},
        [({"input": IMAGES}, torch.zeros(8))],
        [UserDict(input=IMAGES)],
        DataLoader(TensorDataset(IMAGES, torch.zeros(8)), batch_size=8),
    ],
)
def test_every_form_of_the_same_batch_calibrates_alike(batches: object) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = plain()

        def forward(self, input: Tensor) -> Tensor:
            return self.inner(input)

    expected, model = (bw.prepare(Named(), bw.rules("w4a4")) for _ in range(2))
    bw.calibrate(expected, [IMAGES])
    bw.calibrate(model, batches)  # pyright: ignore[reportArgumentType]
    assert all(torch.equal(a, b) for a, b in zip(scales(expected), scales(model), strict=True))
    assert len(scales(model)) == 3


@pytest.mark.parametrize(
    "batch",
    [
        ((torch.ones(2, 6), torch.ones(2, 4)), torch.zeros(2)),
        [[torch.ones(2, 6), torch.ones(2, 4)], torch.zeros(2)],
        {"left": torch.ones(2, 6), "right": torch.ones(2, 4), "scale": 0.5},
    ],
)
def test_models_of_two_inputs(batch: object) -> None:
    model = bw.prepare(Two(), bw.rules("w4a4"))
    bw.calibrate(model, [batch])
    assert bw.coverage(model, batch).complete
    assert model(torch.ones(2, 6), torch.ones(2, 4)).shape == (2, 3)


@pytest.mark.parametrize("batch", ["text", 3, None, [], (), [[]], {}, {"input": "text"}, [("a", "b"), 1], object()])
def test_what_is_no_batch_is_said_in_one_line(batch: object) -> None:
    with pytest.raises(BitwrightError, match=r"^calibrate: a batch is a \w+.*; accepted are a tensor") as caught:
        inputs_of(batch, "calibrate")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("batches", ["text", 3, None, object()])
def test_what_holds_no_batches(batches: object) -> None:
    with pytest.raises(BitwrightError, match=r"^calibrate: batches is a \w+; give a list or loader"):
        list(each_batch(batches, "calibrate"))  # pyright: ignore[reportArgumentType]


def test_an_example_has_no_gradient_and_no_labels() -> None:
    x = torch.ones(2, 3, requires_grad=True)
    found = example_of((x, torch.zeros(2)), "export")
    assert torch.equal(found.args[0], x)
    assert not found.args[0].requires_grad
    assert list(example_of({"left": x, "labels": x}, "export").kwargs) == ["left"]
    with pytest.raises(BitwrightError, match=r"^verify: takes models of one tensor in, not of 2 inputs; wrap"):
        one_tensor(inputs_of(((x, x), torch.zeros(2)), "verify"), "verify")
    with pytest.raises(BitwrightError, match=r"not of 2 inputs, left, right; wrap"):
        one_tensor(inputs_of({"left": x, "right": x}, "verify"), "verify")


Boxes = namedtuple("Boxes", "scores corners")


def test_the_tensors_of_an_output_by_name() -> None:
    x, y = torch.ones(2), torch.zeros(2)
    for output in (x, {"out": x}, (x,), {"logits": x, "loss": None}, {"loss": torch.ones(1), "logits": x}):
        found = outputs_of(output, "verify")
        assert [*found] == ["logits"]
        assert found["logits"] is x
    names = {
        ("out", "aux"): {"out": x, "aux": y},
        ("output_0", "output_1"): (x, y),
        ("output_0_0", "output_1_0", "output_1_1"): ([x], [x, y]),
        ("scores", "corners"): Boxes(x, y),
        ("output_input", "p_3", "last_0", "last_1"): {"input": x, "p.3": y, "last": (x, y), "step": 7},
    }
    for expected, output in names.items():
        assert tuple(outputs_of(output, "verify")) == expected
    assert outputs_of({"out": x, "aux": y}, "verify")["aux"] is y
    for output in ((), None, {"loss": None}):
        with pytest.raises(BitwrightError, match=r"^verify: takes models of tensors out; .* without any$"):
            outputs_of(output, "verify")


class Masked(nn.Module):
    """Reads indices and a mask by name, gives a dict, as Hugging Face's models do; `scale` is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.fc, self.head = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, ids: Tensor, mask: Tensor, labels: Tensor | None = None, scale: float = 1.0) -> dict[str, Tensor]:
        x = torch.relu(self.fc(self.table(ids))) * mask[..., None].float() * scale
        logits = self.head(x.mean(1))
        loss = {} if labels is None else {"loss": nn.functional.cross_entropy(logits, labels)}
        return {**loss, "logits": logits, "hidden": x}


@pytest.mark.parametrize("form", ["dict", "pair"])
def test_models_of_several_inputs_are_deployed(form: str, tmp_path) -> None:
    torch.manual_seed(0)
    if form == "dict":
        model, labels = Masked(), torch.randint(3, (6,))
        batch = {"ids": torch.randint(20, (6, 5)), "mask": torch.randint(2, (6, 5)), "labels": labels, "scale": 2.0}
        one = {k: v[:1] if isinstance(v, Tensor) else v for k, v in batch.items()}
        names = ["ids", "mask"]
    else:
        model, batch = Two(), ((torch.randn(6, 6), torch.randn(6, 4)), torch.zeros(6))
        one, names = ((batch[0][0][:1], batch[0][1][:1]), batch[1][:1]), ["left", "right"]
    bw.prepare(model, bw.rules("w4a4") + bw.topology(model, batch))
    bw.calibrate(model, [batch]).eval()
    bw.snap_biases(model, one)
    assert bw.export(model, tmp_path / "m.onnx", one).dynamic_batch
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"))
    assert [i.name for i in session.get_inputs()] == names
    free = ["batch", "tokens"] if form == "dict" else ["batch"]
    assert all([n for n in i.shape if isinstance(n, str)] == free for i in session.get_inputs())
    other = {**batch, "ids": batch["ids"][:, :3], "mask": batch["mask"][:, :3]} if isinstance(batch, dict) else batch
    found = bw.verify(model, tmp_path / "m.onnx", [batch, other])  # as many tokens as there are
    assert found.ok, found.first_difference
    assert found.images == 12
    assert cost_table(model, batch).size_bytes > 0
    bw.export(model, tmp_path / "m.safetensors", batch, target="packed")
    assert bw.verify(model, tmp_path / "m.safetensors", [batch]).ok
    with pytest.raises(BitwrightError, match=r"m.onnx: the file reads \w+, \w+; the batch has a tensor$"):
        fed(session, tmp_path / "m.onnx", inputs_of(torch.zeros(2, 5), "verify"))
    with pytest.raises(BitwrightError, match=r"^export: target openvino: takes models of one tensor in, not of"):
        bw.export(model, tmp_path / "m.xml", batch, target="openvino")


def test_a_gradient_of_the_example_is_nobodys_business(tmp_path) -> None:
    x = IMAGES.clone().requires_grad_()
    model = plain()
    rules = bw.rules("w8a8") + bw.topology(model, x)
    bw.calibrate(bw.prepare(model, rules), x)
    bw.snap_biases(model, x)
    bw.export(model, tmp_path / "m.onnx", x)
    assert bw.verify(model, tmp_path / "m.onnx", x).ok
    assert x.grad is None
