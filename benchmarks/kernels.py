"""Compile every CUDA kernel for three GPUs, without one, and print the registers that each uses.

    python benchmarks/kernels.py

It needs NVRTC, `pip install nvidia-cuda-nvrtc`, and no driver. It fails if a kernel does not
compile, spills registers or has a stack frame, or if a pass over large arrays has no 16-byte load.
"""

from __future__ import annotations

import ctypes
import importlib.util
import re
import sys
from pathlib import Path
from typing import NamedTuple

from doraxp.backends import CudaKernels, cuda_kernels

ARCHITECTURES = (80, 90, 100)
PASSES = ("outputs", "gradients", "token", "merge", "squares", "merge_wide")
"""The kernels that read arrays of (tokens, out) or (out, in)."""
PROPERTIES = re.compile(
    r"entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
    r"(\d+) bytes spill loads.*?Used (\d+) registers(?:.*?(\d+) bytes smem)?",
)
WIDE = re.compile(r"\bld\.global(?:\.nc)?\.(?:v4\.[bfu]32|v2\.[bfu]64)")


class Compiled(NamedTuple):
    """Registers and bytes that a kernel uses, from the compiler's report."""

    registers: int
    shared: int
    spilled: int
    wide_loads: int


def main() -> None:
    """Compile all kernels, print a table, and exit with 1 if a rule is broken."""
    nvrtc, kernels = load(), cuda_kernels()
    major, minor = ctypes.c_int(), ctypes.c_int()
    nvrtc.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    print(f"NVRTC {major.value}.{minor.value}; registers of a thread, shared bytes of a block\n")
    broken = []
    for types in kernels.builds:
        found = [build(nvrtc, kernels, types, architecture) for architecture in ARCHITECTURES]
        print(f"{types:30}", *(f"{f'sm_{a}':>10}" for a in ARCHITECTURES))
        for name in kernels.names:
            cells = (f"{each[name].registers} {each[name].shared}" for each in found)
            print(f"  {name:28}", *(f"{cell:>10}" for cell in cells))
            for architecture, each in zip(ARCHITECTURES, found, strict=True):
                where = f"{name} of {types} for sm_{architecture}"
                if each[name].spilled:
                    broken.append(f"{where}: {each[name].spilled} bytes spilled or on the stack")
                if name in PASSES and not each[name].wide_loads:
                    broken.append(f"{where}: no load of 16 bytes")
    print("\n".join(broken) or "\nNo spills, no stack frames; 16-byte loads in every large pass.")
    sys.exit(bool(broken))


def load() -> ctypes.CDLL:
    """Return NVRTC from NVIDIA's wheel."""
    spec = importlib.util.find_spec("nvidia")
    folders = spec.submodule_search_locations if spec is not None else []
    found = [path for folder in folders or [] for path in Path(folder).rglob("libnvrtc.so.*")]
    if not found:
        sys.exit("NVRTC was not found: pip install nvidia-cuda-nvrtc")
    return ctypes.CDLL(str(found[0]))


def build(
    nvrtc: ctypes.CDLL, kernels: CudaKernels, types: str, architecture: int
) -> dict[str, Compiled]:
    """Compile the kernels for three dtypes, and return the resources of each by its name."""
    options = f"--gpu-architecture=sm_{architecture}", *kernels.builds[types]
    ptx, log = compiled(nvrtc, kernels.source, options)
    entries = {part.partition("(")[0]: part for part in ptx.split(".entry ")[1:]}
    found = {}
    for block in re.split(r"(?=Compiling entry function)", log)[1:]:
        match = PROPERTIES.search(" ".join(block.split()).replace("Compiling ", ""))
        assert match is not None, block
        name, *numbers = match.groups(default="0")
        stack, stores, loads, registers, shared = map(int, numbers)
        wide = len(WIDE.findall(entries[name]))
        found[name] = Compiled(registers, shared, stack + stores + loads, wide)
    return found


def compiled(nvrtc: ctypes.CDLL, source: str, options: tuple[str, ...]) -> tuple[str, str]:
    """Return the PTX and the compiler's log."""
    program = ctypes.c_void_p()
    arguments = (*options, "--ptxas-options=-v")
    given = (ctypes.c_char_p * len(arguments))(*(text.encode() for text in arguments))
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernels.cu", 0, None, None)
    status = nvrtc.nvrtcCompileProgram(program, len(arguments), given)
    log = text_of(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program)
    if status != 0:
        sys.exit(f"{' '.join(arguments)}\n{log}")
    ptx = text_of(nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX, program)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return ptx, log


def text_of(size_of: ctypes._CFuncPtr, get: ctypes._CFuncPtr, program: ctypes.c_void_p) -> str:
    """Return a text that NVRTC keeps for a program."""
    size = ctypes.c_size_t()
    size_of(program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    get(program, buffer)
    return buffer.value.decode()


if __name__ == "__main__":
    main()
