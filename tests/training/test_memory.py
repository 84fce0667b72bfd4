"""Freed memory stays with the process, or goes back to the system; each in a process of its own."""

import platform
import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys, torch
from bitwright.training.memory import keep_freed_memory
kept = sys.argv[1] == "keep" and keep_freed_memory()
def megabytes():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() // 2**20
before = megabytes()
for _ in range(2):
    blocks = [torch.ones(12_000_000) for _ in range(3)]  # over 32 MiB each: beyond what glibc ever keeps by itself
    del blocks
print(kept, megabytes() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_freed_memory_is_kept():
    def run(how):
        done = subprocess.run([sys.executable, "-c", SCRIPT, how], capture_output=True, text=True, check=True)
        kept, megabytes = done.stdout.split()
        return kept == "True", int(megabytes)

    kept, more = run("keep")
    assert kept
    assert more > 100  # of 137
    assert run("leave")[1] < 60
