"""The Triton kernels without a GPU: run by Triton's interpreter on the CPU, and compiled for GPUs that are not here."""

import importlib
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bitwright import kernels
from bitwright.kernels import fused

triton = pytest.importorskip("triton", reason="triton is not installed (it comes with torch's GPU builds)")
gpu = importlib.import_module("bitwright.kernels.gpu")


def test_in_the_interpreter():
    """`gpu_interpreted.py`: values and gradients of every rule, layout and width."""
    file = Path(__file__).with_name("gpu_interpreted.py")
    line = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    done = subprocess.run(
        line, capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "1"}, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert "5 passed" in done.stdout


TYPES = {
    **dict.fromkeys(("scale", "zeros", "lo", "hi", "strength", "rate", "mean", "parts", "dscale", "dzeros"), "*fp32"),
    **dict.fromkeys(("channels", "columns", "programs", "blocks", "count"), "i32"),
    "seed": "*i64",
    "zero": "fp32",
}
TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "gfx942": ("hip", "gfx942", 64)}


def compiled(kernel, target: str, element: str, **constants):
    """A kernel's code for a GPU; `constants` are its compile-time arguments, absent tensors among them."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {**TYPES, **dict.fromkeys(("x", "y", "g", "dx"), f"*{element}")}
    names, constants = kernel.arg_names, {k: v for k, v in constants.items() if k in kernel.arg_names}
    signature = {n: "constexpr" if n in constants else types[n] for n in names}
    source = ASTSource(kernel, signature, constexprs={(names.index(n),): v for n, v in constants.items()})
    return triton.compile(
        source, target=GPUTarget(*TARGETS[target]), options={k: v for k, v in gpu.options(0, 4).items() if k != "BLOCK"}
    ).asm


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("element", ["fp32", "bf16", "fp16"])
def test_compiles_for_gpus(target, element):
    source = gpu.triton_source
    plain = {"LEARNED": True, "ZEROS": False, "zeros": None}
    full = {"LEARNED": False, "ZEROS": True}
    lone = {"MASKED": False, "rate": None, "seed": None}
    code = compiled(source.forward_kernel, target, element, BLOCK=1024, **plain, **lone)
    compiled(source.forward_kernel, target, element, BLOCK=64, **full, MASKED=True)
    for rule in fused.RULES.values():
        numbers = {"RULE": rule, "REPLACED_ONLY": rule == 3, "BLOCK": 256}
        compiled(source.backward_kernel, target, element, **numbers, **full, MASKED=True)
    compiled(source.backward_kernel, target, element, RULE=0, REPLACED_ONLY=False, BLOCK=4096, **plain, **lone)
    compiled(source.finish_kernel, target, element, BLOCK=1024, **full)
    compiled(source.finish_kernel, target, element, BLOCK=64, **plain, dzeros=None)
    if target.startswith("sm_"):
        assert "div.rn.f32" in code["ptx"]  # the reference's division, not the approximate one
        assert "fma" not in code["ptx"]
        assert element != "bf16" or "cvt.rn.bf16" in code["ptx"]
        assert code["cubin"]


def test_a_device_where_the_kernels_fail_gets_plain_torch(monkeypatch, caplog):
    def broken(*_):
        raise RuntimeError("no such device\nmore")

    monkeypatch.setattr(gpu, "forward", broken)
    with caplog.at_level(logging.WARNING, logger="bitwright"):
        assert not gpu.works(torch.device("cpu"))
    assert "plain torch quantizes on cpu" in caplog.text
    assert "RuntimeError: no such device" in caplog.text


def test_without_triton_plain_torch_is_used(monkeypatch, caplog):
    kernels._fused_works.cache_clear()
    monkeypatch.delattr(kernels, "gpu")
    monkeypatch.setitem(sys.modules, "bitwright.kernels.gpu", None)
    with caplog.at_level(logging.WARNING, logger="bitwright"):
        assert not kernels.fused_available("cuda:0")
        assert not kernels.fused_available("cuda:0")
    assert caplog.text.count("triton is not installed") == 1
    kernels._fused_works.cache_clear()
