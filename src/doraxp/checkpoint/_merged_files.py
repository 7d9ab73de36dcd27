"""Check a tool that merges files: write a model and an adapter, call it, audit its file."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np

from doraxp._base.safetensors import Tensor, write_header
from doraxp._base.types import Adapter, Config
from doraxp.checkpoint._audit import audit
from doraxp.checkpoint._audit_weight import Verdict
from doraxp.checkpoint._merge import Weighted, plan_merge
from doraxp.checkpoint._options import Options
from doraxp.checkpoint._save import save_adapters
from doraxp.testing import Finding, Ran, Report

FUNCTION = "merge_files"
_DTYPES = {"float32": (np.dtype("f4"), "F32"), "bfloat16": (np.dtype(ml_dtypes.bfloat16), "BF16")}
_SHAPES = {
    "tall": (48, 32), "wide": (32, 48), "square": (40, 40), "rank 1": (48, 32),
    "negative magnitude": (48, 32), "zero row of W": (48, 32), "without an adapter": (48, 32),
}  # fmt: skip
MergeFiles = Callable[[str, str, str], object]


def check_merge_files(
    merge_files: MergeFiles,
    *,
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> Report:
    """Let a tool merge an adapter into a model, and audit the file that it writes.

    ::

        merge_files(base, adapter, out)     base and adapter are folders: model.safetensors, and
                                            an adapter as PEFT writes it; out does not exist

    The tool writes a merged model to `out`, a folder or one file of safetensors, in the dtypes of
    the base: float32 in one run, and bfloat16 in another. The tensors are named
    "model.layers.0.weight" and so on; one has no adapter.

    Parameters
    ----------
    merge_files : callable
    progress : callable, optional
        Called before each merge with its description, the number of merges that are done and the
        number of all of them.

    Returns
    -------
    Report
        The function is "merge_files", a case is a tensor, and a problem is the verdict of
        `doraxp audit`. An exception of the tool is a finding of every tensor.

    Examples
    --------
    >>> from doraxp.checkpoint import Options, Weighted, plan_merge, run_merge
    >>> def merge_files(base, adapter, out):
    ...     run_merge(plan_merge(base, [Weighted(adapter)], Options()), out)
    >>> check_merge_files(merge_files).ok
    True
    """
    findings: list[Finding] = []
    runs: list[Ran] = []
    for done, dtype in enumerate(_DTYPES):
        progress(f"{FUNCTION}: {dtype}", done, len(_DTYPES))
        with tempfile.TemporaryDirectory() as folder:
            problems = _problems(Path(folder), dtype, merge_files)
        for case in _SHAPES:
            runs.append(Ran(FUNCTION, case, dtype, False, 1))
            if problem := problems.get(case):
                findings.append(Finding(FUNCTION, case, dtype, "merged", problem, False))
    return Report(tuple(findings), (), len(runs), (), tuple(runs))


def _problems(folder: Path, dtype: str, merge_files: MergeFiles) -> dict[str, str]:
    """Return the fault of the tensor of each case, in words."""
    base, adapter, out = (folder / name for name in ("base", "adapter", "out"))
    names = {case: f"model.layers.{place}.weight" for place, case in enumerate(_SHAPES)}
    layers = _write_base(base, names, dtype)
    save_adapters(adapter, layers)
    try:
        merge_files(str(base), str(adapter), str(out))
        verdicts = audit(plan_merge(base, [Weighted(adapter)], Options()), out)
    except (Exception, SystemExit) as error:  # of the tool, or of its file: a finding
        said = str(error).replace(f"{folder}{os.sep}", "")
        return dict.fromkeys(_SHAPES, f"raises {type(error).__name__}: {said}")
    found = {case: verdicts[name] for case, name in names.items()}
    return {case: _said(verdict) for case, verdict in found.items() if not verdict.right}


def _said(verdict: Verdict) -> str:
    return f"{verdict.verdict} ({verdict.detail})" if verdict.detail else verdict.verdict


def _write_base(
    folder: Path, names: dict[str, str], dtype: str
) -> dict[str, tuple[Adapter, Config]]:
    """Write a model; return its adapters by the paths of their modules."""
    rng = np.random.default_rng(0)
    storage, code = _DTYPES[dtype]
    weights, layers = {}, {}
    for case, (out, inner) in _SHAPES.items():
        config = Config(1, 2.0) if case == "rank 1" else Config(3, 4.0)
        weight = rng.standard_normal((out, inner))
        m = rng.uniform(0.5, 1.5, out) * np.sqrt(inner)
        if case == "zero row of W":
            weight[2] = 0
        if case == "negative magnitude":
            m[::2] *= -1
        a, b = (rng.standard_normal(shape) for shape in ((config.rank, inner), (out, config.rank)))
        weights[names[case]] = weight.astype(storage)
        if case != "without an adapter":
            path = names[case].removesuffix(".weight")
            layers[path] = Adapter(*(array.astype("f4") for array in (a, b, m))), config
    folder.mkdir()
    with (folder / "model.safetensors").open("wb") as file:
        tensors = {name: Tensor(code, w.shape, w.nbytes) for name, w in weights.items()}
        write_header(file, tensors, {"format": "pt"})
        for weight in weights.values():
            file.write(weight.tobytes())
    return layers
