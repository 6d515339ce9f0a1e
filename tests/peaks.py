"""What was held at most: resident memory as the operating system counts it (the head of scripts that tests run), and
the largest tensor."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

PEAK = """
import ctypes, sys
from pathlib import Path

def peak():
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024

def reset():
    ctypes.CDLL(None).malloc_trim(0)  # memory that the allocator only hoards would hide what is taken anew
    Path("/proc/self/clear_refs").write_text("5")
    return peak()
"""


class LargestTensor(TorchDispatchMode):
    """Records the largest tensor that any operation makes."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else (out,):
            if isinstance(value, torch.Tensor):
                self.numel = max(self.numel, value.numel())
        return out
