"""The package's front: public names, and what it does not load before somebody asks."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import bitwright as bw


def test_public_names_are_those_that_type_checkers_see():
    source = ast.parse(Path(bw.__file__).read_text())
    block = next(node for node in source.body if isinstance(node, ast.If))
    imports = [
        (node.module, alias.name) for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names
    ]
    assert {name for _, name in imports} | {"BitwrightError"} == set(bw.__all__)
    for module, name in imports:
        assert getattr(bw, name) is getattr(importlib.import_module(module or ""), name), name
    assert set(bw.__all__) <= set(dir(bw))


def test_a_submodule_hides_no_function():
    code = (
        "import bitwright.calibrate, bitwright.coverage, bitwright.prepare, bitwright.rules, bitwright.topology\n"
        "import bitwright as bw\n"
        "print(*(callable(f) for f in (bw.calibrate, bw.coverage, bw.prepare, bw.rules, bw.topology)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True"] * 5


def test_the_help_page_loads_no_torch():
    code = (
        "import sys\nfrom bitwright.cli import main\nsys.argv = ['bitwright', 'train', '--help']\n"
        "try:\n    main()\nexcept SystemExit as done:\n    assert done.code == 0\n"
        "assert not {'torch', 'onnx', 'scipy'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--resume" in done.stdout


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'bitwright' has no attribute 'quantise'"):
        bw.quantise  # noqa: B018
