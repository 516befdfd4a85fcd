"""What this machine can do: device, dtype, torch.compile, peak FLOP/s, peak memory."""
import ctypes
import os
import platform
import re
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from nanop.errors import UserError, explained, first_line

PEAK_FLOPS = {  # dense bf16 FLOP/s (fp16 where the chip has no bf16) by words of the device's name; first match wins
    'GB200': 2.5e15, 'B200': 2.25e15, 'B100': 1.75e15,
    'H200': 989e12, 'GH200': 989e12, 'H100 PCIe': 756e12, 'H100 NVL': 835e12, 'H100': 989e12, 'H800': 989e12,
    'A100': 312e12, 'A800': 312e12, 'A30': 165e12, 'A40': 150e12, 'RTX A6000': 155e12, 'A10': 125e12, 'A10G': 70e12,
    'L40S': 362e12, 'L40': 181e12, 'L4': 121e12, 'RTX 4090': 165e12, 'RTX 3090': 71e12, 'V100': 125e12, 'T4': 65e12,
    'MI355X': 2.5e15, 'MI325X': 1.307e15, 'MI300X': 1.307e15}
MALLOPT_TRIM_THRESHOLD, MALLOPT_MMAP_MAX = -1, -4  # of glibc's malloc.h
DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}


class Machine(NamedTuple):
    """The device of this process and the dtype of its matrix products."""
    device: torch.device
    dtype: torch.dtype

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    @property
    def dtype_name(self):
        return str(self.dtype).removeprefix('torch.')

    @property
    def device_name(self):
        return torch.cuda.get_device_name(self.device) if self.device.type == 'cuda' else self.device.type


def set_up(device, dtype, keep_memory=True):
    """The Machine for a config's `device` and `dtype`, with this process set up for it."""
    device = pick_device(device)
    machine = Machine(device, pick_dtype(dtype, device))
    if keep_memory:
        keep_freed_memory()
    if device.type == 'cuda':
        torch.cuda.set_device(device)
        # TF32 for what autocast leaves in float32
        torch.set_float32_matmul_precision('highest' if machine.dtype == torch.float32 else 'high')
    return machine


def pick_device(name):
    """The device called `name`; 'auto' takes cuda, then mps, then cpu."""
    if name == 'auto':
        name = 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'
    with explained((RuntimeError, AssertionError), f"device='{name}' does not work here", "use device='auto' or 'cpu'"):
        return torch.empty(1, device=name).device  # 'cuda' becomes cuda:0, as set_device wants it


def keep_freed_memory():
    """Let glibc keep freed memory, unless the user configured malloc: fresh pages at every step would take longer."""
    if sys.platform == 'linux' and not any(name.startswith(('MALLOC_', 'GLIBC_TUNABLES')) for name in os.environ):
        with suppress(AttributeError):  # another C library
            for option, value in ((MALLOPT_TRIM_THRESHOLD, -1), (MALLOPT_MMAP_MAX, 0)):
                ctypes.CDLL(None).mallopt(option, value)


def cpu_has_bf16():
    """Whether the CPU has bf16 instructions (AVX512-BF16 or AMX on x86, BF16 on Arm)."""
    has = getattr(torch.cpu, 'get_capabilities', dict)()  # torch before 2.12 can only answer the second line
    return any(has.get(name) for name in ('avx512_bf16', 'amx_bf16', 'bf16', 'sve_bf16')) or \
        torch.cpu._is_avx512_bf16_supported()


def pick_dtype(name, device):
    """The autocast dtype called `name`; 'auto' takes bf16 where the device computes in it."""
    if name == 'auto':
        if device.type == 'cuda':
            bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            bf16 = device.type == 'cpu' and cpu_has_bf16()
        name = 'bfloat16' if bf16 else 'float16' if device.type == 'cuda' else 'float32'
    if name not in DTYPES:
        raise UserError(f"dtype='{name}' is not allowed: use one of auto, {', '.join(DTYPES)}")
    if name == 'float16' and device.type != 'cuda':
        raise UserError(f"dtype='float16' needs the gradient scaling of a CUDA device, this is {device.type}: "
                        "use 'auto', 'bfloat16' or 'float32'")
    return DTYPES[name]


@cache
def why_not_compile(device):
    """One line that says why torch.compile does not work here, or None where it does."""
    if device.type == 'mps':
        return 'not used on mps'
    try:
        torch.compile(lambda x: x * 2 + 1)(torch.zeros(8, device=device))
    except Exception as error:
        return f'{type(error).__name__}: {first_line(error)}'
    return None


def flops_per_token(model):
    """Training FLOPs of a token: 6 per multiplied weight, masked or not, plus attention (arXiv:2204.02311, App. B)."""
    c = model.config
    looked_up = c.n_embd * (c.vocab_size * (not c.tie_weights) + c.block_size * (c.pos == 'learned'))
    return 6 * (model.num_params() - looked_up) + 12 * c.n_layer * c.n_embd * c.block_size


def peak_flops(device, dtype):
    """Dense peak FLOP/s of the device in 16 bits; None for float32 or a device that is not in the table."""
    if device.type != 'cuda' or dtype == torch.float32:
        return None
    name = torch.cuda.get_device_name(device)
    known = [flops for words, flops in PEAK_FLOPS.items() if re.search(rf'\b{words}\b', name) and 'Laptop' not in name]
    return known[0] if known else None


def peak_memory_bytes(device):
    """Peak memory of this process on `device`, in bytes."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device)
    status = Path('/proc/self/status')
    if status.exists():  # Linux, where getrusage() would start from the peak of the parent process
        return int(re.search(r'VmHWM:\s+(\d+) kB', status.read_text()).group(1)) * 1024
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)


def hardware_name(device):
    """The name of the GPU, or of the CPU with its number of cores."""
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    info = Path('/proc/cpuinfo')
    found = re.search(r'model name\s*: (.*)', info.read_text()) if info.exists() else None
    return f"{found.group(1) if found else platform.processor() or platform.machine()}, {os.cpu_count()} cores"
