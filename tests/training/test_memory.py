"""Freed memory stays: a second block of the same size costs no page faults. In a process of its own: it is for good."""

import platform
import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys, torch
from bitwright.training.memory import keep_freed_memory
kept = sys.argv[1] == "keep" and keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        blocks = [torch.ones(3_000_000) for _ in range(12)]
        del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(kept, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_freed_memory_is_used_again_without_page_faults():
    def run(how):
        done = subprocess.run([sys.executable, "-c", SCRIPT, how], capture_output=True, text=True, check=True)
        kept, faults = done.stdout.split()
        return kept == "True", int(faults)

    kept, few = run("keep")
    assert kept
    assert few < 100
    assert run("leave")[1] > few
