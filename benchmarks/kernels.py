"""Compile every CUDA kernel for three GPUs, without one, and print the resources that each uses.

    python benchmarks/kernels.py

It needs NVRTC and the disassembler, `pip install nvidia-cuda-nvrtc nvidia-cuda-nvdisasm`, and no
driver. It fails if a kernel does not compile, spills registers or has a stack frame, or if a pass
over large arrays breaks a rule of `Pass`. The rules are checked on the machine code: PTX does not
show that the compiler merges the stores of two branches into narrow ones.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

from doraxp.backends import cuda_kernels

ARCHITECTURES = (80, 90, 100)
WIDE = 16
"""Bytes of the accesses that large arrays need."""
REPORT = re.compile(
    r"entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
    r"(\d+) bytes spill loads.*?Used (\d+) registers(?:.*?(\d+) bytes smem)?",
)
ACCESS = re.compile(r"\s(LDG|STG|LDGSTS|LD|ST)\.([\w.]+) ")
LOW, WIDER = ("float16", "bfloat16"), ("float32", "float64")
"""The dtypes of 16 bits, and of more."""
SKINNY: dict[str, tuple[str, ...]] = {"storages": LOW, "computes": ("float32",)}
"""The builds that launch the kernels for a factor as narrow as a rank."""
WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
"""Bytes of an access to global memory by a part of its name. Without one of these it has 4."""


class Pass(NamedTuple):
    """The rules of a kernel that reads large arrays, (tokens, out) or (out, in).

    It needs at least `loads` and `stores` of 16 bytes. Its code has two ways: one for packs of 16
    bytes, and one for rows with a ragged end, number by number. So its narrow accesses may move as
    many bytes as its wide ones, and `few_loads` or `few_stores` numbers of small arrays (a gain, a
    bias, a sum). More of them would be the packs, number by number, or a small array read again for
    each number of a large one. `whole` more loads of 16 bytes are of arrays without ragged ends,
    where product_t has 16 bits and else.
    """

    loads: int = 1
    stores: int = 1
    few_loads: int = 0
    few_stores: int = 0
    whole: tuple[int, int] = 0, 0
    storages: tuple[str, ...] = (*LOW, *WIDER)
    """The first dtype of the builds that are launched."""
    computes: tuple[str, ...] = ("float32", "float64")
    """Their third dtype."""


LANE = 4 + 8
"""Rows and columns of a lane of `merge`. Its code has a way for W by rows, and one by columns."""
PASSES = {
    # The loops that form the numbers of a suspect row, for x and y of either dtype.
    "outputs": Pass(few_loads=24, few_stores=3),
    # ρ and the marks of the suspect rows, for the columns of a thread.
    "gradients": Pass(few_loads=16, few_stores=24),
    # dy in two orders and z; dz, and the sums of dyᵀ L. A chunk's other sums are narrow.
    "mixed_gradients": Pass(12, 12, few_loads=52, few_stores=25, **SKINNY),
    # M in four ways (one or two tiles, F by rows or by columns), and F by rows.
    "project": Pass(148, 0, **SKINNY),
    # The ways of `project` with F by rows.
    "adapted_norm": Pass(84, 0, **SKINNY),
    # Four rows of M for each place of the ring, and two ranks of F.
    "pull": Pass(16, 0, few_loads=16, **SKINNY),
    # It loads small arrays alone. One number is the suspect rows' part.
    "update": Pass(0, few_stores=1),
    # The small arrays of two rows, and the loop over the rank that forms a suspect row.
    "token": Pass(stores=0, few_loads=40),
    "cast": Pass(),
    # The gain, ρ and the scale of b once for each, and the scale of a strip of A in either way.
    "merge": Pass(few_loads=3 * LANE + 2, whole=(8, 12), computes=("float32",)),
    "squares": Pass(stores=0, few_loads=2 * LANE + 2, whole=(8, 12)),
    # Four rows of b for each term, in all copies of the unrolled loop over the rank.
    "merge_wide": Pass(few_loads=88, computes=("float64",)),
}


class Bytes(NamedTuple):
    """How many accesses of 16 bytes there are, and how many bytes and accesses are narrower."""

    wide: int = 0
    narrow: int = 0
    narrow_bytes: int = 0

    def __str__(self) -> str:
        return f"{self.wide}/{self.narrow}"


class Compiled(NamedTuple):
    """The resources of a kernel, from the compiler's report and the machine code."""

    registers: int
    shared: int
    spilled: int
    loads: Bytes
    stores: Bytes


def main() -> None:
    """Compile all kernels, print a table, and exit with 1 if a rule is broken."""
    argparse.ArgumentParser(description=__doc__.partition("\n")[0]).parse_args()
    kernels, broken = cuda_kernels(), []
    jobs = [(types, each) for types in kernels.builds for each in ARCHITECTURES]
    print(f"NVRTC {version(load())}; registers of a thread, shared bytes of a block;")
    print("for a pass, its loads and stores of 16 bytes / of less in the machine code\n")
    with ProcessPoolExecutor() as pool:
        found = dict(zip(jobs, pool.map(build, *zip(*jobs, strict=True)), strict=True))
    for types in kernels.builds:
        print(f"{types:26}", *(f"{f'sm_{each}':>25}" for each in ARCHITECTURES))
        for name in kernels.names:
            each = {a: found[types, a][name] for a in ARCHITECTURES}
            print(f"  {name:24}", *(f"{cell(name, one):>25}" for one in each.values()))
            for architecture, one in each.items():
                where = f"{name} of {types} for sm_{architecture}"
                broken += [f"{where}: {rule}" for rule in broken_rules(name, types, one)]
    print("\n".join(broken) or "\nNo spills, no stack frames; large passes use 16-byte accesses.")
    sys.exit(bool(broken))


def cell(name: str, found: Compiled) -> str:
    """Return the table's text for a kernel."""
    accesses = f" {found.loads} {found.stores}" if name in PASSES else ""
    return f"{found.registers} {found.shared}{accesses}"


def broken_rules(name: str, types: str, found: Compiled) -> Iterator[str]:
    """Return the rules that a kernel breaks."""
    if found.spilled:
        yield f"{found.spilled} bytes spilled or on the stack"
    rules = PASSES.get(name)
    storage, product, compute = types.split()
    if rules is None or storage not in rules.storages or compute not in rules.computes:
        return
    whole = rules.whole[product in WIDER]
    for kind, made, least, few, other in (
        ("loads", found.loads, rules.loads, rules.few_loads, whole),
        ("stores", found.stores, rules.stores, rules.few_stores, 0),
    ):
        if least == 0:
            continue
        if made.wide < least + other:
            yield f"{made.wide} {kind} of 16 bytes, fewer than {least + other}"
        limit = WIDE * max(made.wide - other, 0) + few * int(compute[-2:]) // 8
        if made.narrow_bytes > limit:
            yield f"narrow {kind} of {made.narrow_bytes} bytes, more than {limit}"


def load() -> ctypes.CDLL:
    """Return NVRTC from NVIDIA's wheel."""
    return ctypes.CDLL(str(of_wheel("libnvrtc.so.*", "nvidia-cuda-nvrtc")))


def of_wheel(pattern: str, package: str) -> Path:
    """Return the path of a file in one of NVIDIA's wheels."""
    spec = importlib.util.find_spec("nvidia")
    folders = spec.submodule_search_locations if spec is not None else []
    found = [path for folder in folders or [] for path in Path(folder).rglob(pattern)]
    if not found:
        sys.exit(f"{pattern} was not found: pip install {package}")
    return found[0]


def version(nvrtc: ctypes.CDLL) -> str:
    """Return the version of NVRTC."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    nvrtc.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return f"{major.value}.{minor.value}"


def build(types: str, architecture: int) -> dict[str, Compiled]:
    """Compile the kernels for three dtypes, and return the resources of each by its name."""
    kernels = cuda_kernels()
    options = f"--gpu-architecture=sm_{architecture}", *kernels.builds[types]
    cubin, log = compiled(load(), kernels.source, options)
    code, found = functions(disassembled(cubin)), {}
    for block in re.split(r"(?=Compiling entry function)", log)[1:]:
        match = REPORT.search(" ".join(block.split()).replace("Compiling ", ""))
        assert match is not None, block
        name, *numbers = match.groups(default="0")
        stack, stores, loads, registers, shared = map(int, numbers)
        found[name] = Compiled(registers, shared, stack + stores + loads, *accesses(code[name]))
    return found


def compiled(nvrtc: ctypes.CDLL, source: str, options: tuple[str, ...]) -> tuple[bytes, str]:
    """Return the machine code and the compiler's log."""
    program = ctypes.c_void_p()
    arguments = (*options, "--ptxas-options=-v")
    given = (ctypes.c_char_p * len(arguments))(*(text.encode() for text in arguments))
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernels.cu", 0, None, None)
    status = nvrtc.nvrtcCompileProgram(program, len(arguments), given)
    log = kept(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program)
    log_text = log.rstrip(b"\0").decode()
    if status != 0:
        raise RuntimeError(f"{' '.join(arguments)}\n{log_text}")
    cubin = kept(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, program)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return cubin, log_text


def kept(size_of: ctypes._CFuncPtr, get: ctypes._CFuncPtr, program: ctypes.c_void_p) -> bytes:
    """Return the bytes of something that NVRTC keeps for a program."""
    size = ctypes.c_size_t()
    size_of(program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    get(program, buffer)
    return buffer.raw


def disassembled(cubin: bytes) -> str:
    """Return the machine code as text."""
    program = of_wheel("nvdisasm", "nvidia-cuda-nvdisasm")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(program), "--print-code", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def functions(code: str) -> dict[str, str]:
    """Return the code of each kernel by its name."""
    parts = re.split(r"^\s*\.section\s+\.text\.", code, flags=re.MULTILINE)[1:]
    return {part.partition(",")[0]: part for part in parts}


def accesses(code: str) -> tuple[Bytes, Bytes]:
    """Count a kernel's loads from global memory, and its stores to it."""
    widths: tuple[list[int], list[int]] = [], []
    for kind, name in ACCESS.findall(code):
        width = next((WIDTHS[part] for part in name.split(".") if part in WIDTHS), 4)
        widths[kind.startswith("ST")].append(width)
    made = []
    for each in widths:
        narrow = [width for width in each if width < WIDE]
        made.append(Bytes(len(each) - len(narrow), len(narrow), sum(narrow)))
    return made[0], made[1]


if __name__ == "__main__":
    main()
