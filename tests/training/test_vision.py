"""Imports happen once a process, so each case runs in one of its own."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest


def run(code: str, *, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    prelude = f"import sys; sys.path.insert(0, {str(path)!r})\n" if path else ""
    return subprocess.run([sys.executable, "-c", prelude + code], capture_output=True, text=True, timeout=300)


@pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="the vision extra is not installed")
def test_the_installed_torchvision_and_timm_work() -> None:
    done = run(
        "import torch\n"
        "from bitwright.training.vision import import_timm, import_torchvision\n"
        "assert import_torchvision() is import_torchvision()\n"
        "model = import_torchvision().models.resnet18(weights=None, num_classes=3)\n"
        "assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 3)\n"
        "assert import_timm().create_model('resnet10t', num_classes=3)(torch.zeros(2, 3, 32, 32)).shape == (2, 3)\n"
    )
    assert done.returncode == 0, done.stderr


FAKE = """
from torchvision import half
import torch
@torch.library.register_fake("torchvision::nms")
def nms(dets, scores, iou_threshold):
    return dets
torch.library.register_fake("torchvision::qnms")(nms)
whole = True
"""


def fake_torchvision(folder: Path, init: str) -> Path:
    package = folder / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text(init)
    (package / "half.py").write_text("import builtins\nbuiltins.imports = getattr(builtins, 'imports', 0) + 1\n")
    return folder


def test_operators_that_cannot_load_are_declared_and_the_import_repeated(tmp_path: Path) -> None:
    done = run(
        "import builtins, gc, torch\n"
        "from bitwright.training.vision import import_torchvision\n"
        "assert import_torchvision().whole\n"
        "assert builtins.imports == 2, 'the half-imported submodule was kept'\n"
        "gc.collect()\n"
        "assert torch.ops.torchvision.nms.default and torch.ops.torchvision.qnms.default\n"
        "assert import_torchvision().whole and builtins.imports == 2\n",
        path=fake_torchvision(tmp_path, FAKE),
    )
    assert done.returncode == 0, done.stderr


def test_nothing_is_declared_when_the_import_succeeds(tmp_path: Path) -> None:
    done = run(
        "import torch\n"
        "from bitwright.training.vision import import_torchvision\n"
        "assert import_torchvision().whole\n"
        "assert not hasattr(torch.ops.torchvision, 'nms')\n",
        path=fake_torchvision(tmp_path, "from torchvision import half\nwhole = True\n"),
    )
    assert done.returncode == 0, done.stderr


def test_another_failure_is_not_hidden(tmp_path: Path) -> None:
    done = run(
        "from bitwright.training.vision import import_torchvision\nimport_torchvision()\n",
        path=fake_torchvision(tmp_path, "raise RuntimeError('operator torchvision::roi_pool does not exist')\n"),
    )
    assert done.returncode == 1
    assert done.stderr.endswith("RuntimeError: operator torchvision::roi_pool does not exist\n")


@pytest.mark.parametrize(("function", "absent"), [("torchvision", "torchvision"), ("timm", "timm")])
def test_what_is_not_installed_is_named_with_the_extra_that_brings_it(
    function: str, absent: str, tmp_path: Path
) -> None:
    fake_torchvision(tmp_path, "whole = True\n")
    done = run(
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == {absent!r}:\n"
        f"            raise ModuleNotFoundError('No module named {absent}', name={absent!r})\n"
        "sys.meta_path.insert(0, Absent())\n"
        f"from bitwright.training.vision import import_{function}\n"
        f"import_{function}()\n",
        path=tmp_path,
    )
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last == f'bitwright.errors.BitwrightError: {absent} is not installed: pip install "bitwright[vision]"'
