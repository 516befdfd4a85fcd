"""
What this machine can do: device, dtype, whether torch.compile works, peak FLOP/s.
"""
import ctypes
import os
import re
import sys
from contextlib import suppress
from functools import cache

import torch

from configurator import UserError, first_line

PEAK_FLOPS = {  # dense bf16 (fp16 where the chip has no bf16) FLOP/s by the words of a device's name; first match wins
    'GB200': 2.5e15, 'B200': 2.25e15, 'B100': 1.75e15,
    'H200': 989e12, 'GH200': 989e12, 'H100 PCIe': 756e12, 'H100 NVL': 835e12, 'H100': 989e12, 'H800': 989e12,
    'A100': 312e12, 'A800': 312e12, 'A30': 165e12, 'A40': 150e12, 'RTX A6000': 155e12, 'A10': 125e12, 'A10G': 70e12,
    'L40S': 362e12, 'L40': 181e12, 'L4': 121e12, 'RTX 4090': 165e12, 'RTX 3090': 71e12, 'V100': 125e12, 'T4': 65e12,
    'MI355X': 2.5e15, 'MI325X': 1.307e15, 'MI300X': 1.307e15,
}

MALLOPT_TRIM_THRESHOLD, MALLOPT_MMAP_MAX = -1, -4  # of glibc's malloc.h

DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}


def pick_device(name):
    """The device called `name`; 'auto' takes cuda, then mps, then cpu. Raises UserError."""
    if name == 'auto':
        name = 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'
    try:
        return torch.empty(1, device=name).device  # 'cuda' becomes cuda:0, as set_device wants it
    except (RuntimeError, AssertionError) as error:
        reason = first_line(error)
        raise UserError(f"device='{name}' does not work here ({reason}): use device='auto' or 'cpu'") from None


def keep_freed_memory():
    """Has glibc keep what large tensors leave for the next ones, where none of its own variables is set.

    By default it returns them to the system, and to get fresh pages costs more than many a product.
    """
    if sys.platform == 'linux' and not any(name.startswith(('MALLOC_', 'GLIBC_TUNABLES')) for name in os.environ):
        with suppress(AttributeError):  # another C library
            for option, value in ((MALLOPT_TRIM_THRESHOLD, -1), (MALLOPT_MMAP_MAX, 0)):
                ctypes.CDLL(None).mallopt(option, value)


def cpu_has_bf16():
    """Whether the CPU has bf16 instructions (AVX512-BF16 or AMX on x86, BF16 on Arm)."""
    has = getattr(torch.cpu, 'get_capabilities', dict)()  # torch before 2.12 has only the second line's question
    return any(has.get(name) for name in ('avx512_bf16', 'amx_bf16', 'bf16', 'sve_bf16')) or \
        torch.cpu._is_avx512_bf16_supported()


def pick_dtype(name, device):
    """The autocast dtype called `name`; 'auto' takes bf16 where the device computes in it. Raises UserError."""
    if name == 'auto':
        if device.type == 'cuda':
            bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            bf16 = device.type == 'cpu' and cpu_has_bf16()
        name = 'bfloat16' if bf16 else 'float16' if device.type == 'cuda' else 'float32'
    if name not in DTYPES:
        raise UserError(f"dtype='{name}' is not known: use auto, {', '.join(DTYPES)}")
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


def peak_flops(device, dtype):
    """Dense peak FLOP/s of the device in 16 bits, or None where it is not in the table or the dtype is another."""
    if device.type != 'cuda' or dtype == torch.float32:
        return None
    name = torch.cuda.get_device_name(device)
    if 'Laptop' in name:
        return None
    return next((flops for words, flops in PEAK_FLOPS.items() if re.search(rf'\b{words}\b', name)), None)
