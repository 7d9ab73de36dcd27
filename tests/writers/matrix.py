"""A case, its result, and the comparison of OUT with the writer's own merge.

A case makes a `Trial` in an empty folder: a base, an adapter, and the right values. `judge` runs
`doraxp merge` on it, or `doraxp convert`. The result is one of three:

    right      every tensor and every output is within the case's bound of the right one
    refused    the command ended with an error
    WRONG      the command ended without an error, and OUT is not right

A difference is relative to the largest number of a tensor: max|got - right| / max|right|.
"""

from __future__ import annotations

import contextlib
import io
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file

from doraxp.cli import main

BOUND = 1e-5
"""Of the differences of a float32 model. A case in fewer bits has a bound of its own."""
BOUND16 = 1e-2
"""Of a bfloat16 or float16 model: little above 2^-7, the distance of two bfloat16 numbers at 1."""
CLOSE = 1e-6
"""Of the tensors of a float32 model where no norm is divided by; outputs have BOUND."""
CASES: list[Case] = []
Tensors = Mapping[str, torch.Tensor]


class Trial(NamedTuple):
    """The input of one merge, and the right values.

    `right` has the tensors of OUT by name, as `read_tensors` returns them; without tensors, only
    outputs are compared. `outputs` loads a folder
    with the writer's library and returns the model's output, whose right value is `wanted`. OUT may
    lack or have the tensors in `free`: for example, those of an old head. Names with and without
    the `prefix` are equal. With `to`, the adapter is converted to that format, and `read` merges
    OUT by the package whose format it is.
    """

    base: Path
    adapter: Path
    right: Tensors
    outputs: Callable[[Path], torch.Tensor] | None = None
    wanted: torch.Tensor | None = None
    options: tuple[str, ...] = ()
    free: frozenset[str] = frozenset()
    prefix: str = ""
    to: str = ""
    read: Callable[[Path], Tensors] | None = None


class Case(NamedTuple):
    """A cell of the matrix. `refused` is a part of the message of a refusal that is right."""

    writer: str
    name: str
    make: Callable[[Path], Trial]
    bound: float = BOUND
    refused: str | None = None


class Result(NamedTuple):
    """The content of a cell."""

    state: str
    tensors: float | None = None
    outputs: float | None = None
    text: str = ""


def register(
    writer: str,
    name: str,
    make: Callable[[Path], Trial],
    *,
    bound: float = BOUND,
    refused: str | None = None,
) -> None:
    """Add a case to the matrix."""
    CASES.append(Case(writer, name, make, bound, refused))


def judge(case: Case, folder: Path) -> Result:
    """Merge the case's trial, and compare OUT with the right values."""
    torch.manual_seed(0)
    trial = case.make(folder)
    out = folder / ("out.safetensors" if trial.base.is_file() else "out")
    status, message = run(trial, out)
    if status:
        return Result("refused", text=plain(message, folder))
    try:
        tensors = outputs = None
        if trial.right:
            tensors = difference_of_tensors((trial.read or read_tensors)(out), trial)
        if trial.outputs is not None:
            outputs = difference(trial.outputs(out), trial.wanted)
    except (KeyError, OSError, RuntimeError, ValueError) as error:  # OUT cannot be loaded
        return Result("WRONG", text=plain(f"{type(error).__name__}: {error}", folder))
    is_right = (tensors or 0.0) <= case.bound and (outputs or 0.0) <= max(case.bound, BOUND)
    return Result("right" if is_right else "WRONG", tensors, outputs)


def run(trial: Trial, out: Path) -> tuple[int, str]:
    """Return the exit status of the command, and its messages."""
    messages = io.StringIO()
    arguments = ["merge", str(trial.base), str(trial.adapter), "--out", str(out), "--jobs", "1"]
    if trial.to:
        source, base = str(trial.adapter), str(trial.base)
        arguments = ["convert", source, "--base", base, "--to", trial.to, "--out", str(out)]
    with contextlib.redirect_stderr(messages), contextlib.redirect_stdout(io.StringIO()):
        try:
            status = main([*arguments, *trial.options])
        except SystemExit as stop:  # of argparse, for an option that it does not know
            status = int(stop.code or 0)
    return status, messages.getvalue()


def plain(message: str, folder: Path) -> str:
    """Return the message's last error in one line, without the paths of this run."""
    text = message.rpartition("error: ")[2] if "error: " in message else message
    return re.sub(r"\s+", " ", text.replace(f"{folder}/", "")).strip()


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a file, or of all files of a folder; sub-folders are in the names.

    Files of a variant, `model.fp16.safetensors`, are left out.
    """
    if path.is_file():
        return load_file(path)
    files = [file for file in sorted(path.rglob("*.safetensors")) if ".fp16" not in file.name]
    return {
        str(file.parent.relative_to(path) / name): tensor
        for file in files
        for name, tensor in load_file(file).items()
    }


def difference_of_tensors(got: Tensors, trial: Trial) -> float:
    """Return the largest difference; it is infinite where OUT lacks a tensor.

    A tensor of OUT that the writer's merge does not have must be in the base, and equal to it.
    """
    got, right, base = (
        {name.removeprefix(trial.prefix): tensor for name, tensor in tensors.items()}
        for tensors in (got, trial.right, read_tensors(trial.base))
    )
    free = {name.removeprefix(trial.prefix) for name in trial.free}
    wanted = right | {name: base[name] for name in got if name not in {*right, *free}}
    return max(
        difference(got.get(name), tensor)
        for name, tensor in wanted.items()
        if name in got or name not in free
    )


def difference(got: torch.Tensor | None, right: torch.Tensor) -> float:
    """Return max|got - right| / max|right|."""
    if got is None or got.shape != right.shape:
        return math.inf
    if right.numel() == 0:
        return 0.0
    right = right.detach().double()
    off = (got.detach().double() - right).abs().max() / right.abs().max().clamp_min(1e-30)
    return math.inf if off.isnan() else off.item()
