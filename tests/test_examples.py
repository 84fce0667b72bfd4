"""The examples run, and are as short as they say."""

import copy
import importlib.util
import math
import re
from pathlib import Path

import onnx
import pytest
import torch

import bitwright as bw
from bitwright.training.models.resnet import CifarResNet

EXAMPLES = Path(__file__).parent.parent / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_loop_of_ones_own_needs_at_most_five_lines(monkeypatch):
    text = (EXAMPLES / "own_loop.py").read_text()
    marked = [line for line in text.splitlines() if line.endswith("# (bitwright)")]
    calls = [line for line in text.splitlines() if "bw." in line]
    assert set(calls) <= set(marked)
    assert len(marked) <= 5
    module = load("own_loop")
    seen = {}
    prepare = module.bw.prepare
    monkeypatch.setattr(module.bw, "prepare", lambda m, r: seen.setdefault("model", prepare(m, r)))
    assert math.isfinite(module.main(batches=2, size=32))
    rows = {r.name: (r.bits, r.calibrated) for r in module.bw.describe(seen["model"])}
    assert rows["conv1.weight_quantizer"] == rows["fc.input_quantizer"] == (8, True)
    middle = {
        (name.endswith("output_quantizer"), bits) for name, (bits, _) in rows.items() if name[:2] not in ("co", "fc")
    }
    assert middle == {(False, 4), (True, 8)}
    with torch.no_grad():
        codes = seen["model"].layer2[0].conv1.weight_quantizer.integer_codes(seen["model"].layer2[0].conv1.weight)
    assert codes.unique().numel() <= 16


def test_a_hugging_face_model(tmp_path):
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    assert load("hugging_face").main(tmp_path / "bert.onnx", batches=4, layers=1)
    graph = onnx.load(str(tmp_path / "bert.onnx")).graph
    free = {i.name: [d.dim_param for d in i.type.tensor_type.shape.dim] for i in graph.input}
    assert free == {"input_ids": ["batch", "tokens"], "attention_mask": ["batch", "tokens"]}


def test_the_readmes_five_lines_run(tmp_path, monkeypatch):
    readme = (EXAMPLES.parent / "README.md").read_text()
    block = re.search(r"```python\n(.*?)```", readme, re.DOTALL).group(1)
    lines = [line for line in block.splitlines() if line and not line.startswith("...")]
    assert len(lines) == 5
    monkeypatch.chdir(tmp_path)
    images = [torch.randn(4, 3, 8, 8) for _ in range(2)]
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 8, 3), torch.nn.Flatten(), torch.nn.Linear(128, 5)
    )
    exec(block, {"model": model.eval(), "loader_of_some_images": images, "example": images[0]})
    assert (tmp_path / "model.onnx").is_file()
    assert bw.verify(model, "model.onnx", images).ok


def test_the_loop_pages_program_runs(tmp_path, monkeypatch):
    page = (EXAMPLES.parent / "docs" / "loop.md").read_text()
    block = re.search(r"```python\n(.*?)```", page, re.DOTALL).group(1)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    net = CifarResNet(8, 4, width=4)
    data = [(torch.randn(8, 3, 8, 8), torch.arange(8) % 4) for _ in range(4)]
    names = {"model": copy.deepcopy(net), "float_model": net, "example": data[0][0], "batches": data}
    exec(block, names)
    again, average = names["again"].eval(), names["average"]
    assert torch.equal(again(data[0][0]), average(data[0][0]))
    grouped = [len(group["params"]) for group in names["optimizer"].param_groups]
    assert sum(grouped) == sum(p.requires_grad for p in names["model"].parameters())
    assert grouped[2] == len(bw.split_parameters(names["model"])[1]) > 0
