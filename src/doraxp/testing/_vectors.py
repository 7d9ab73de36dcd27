"""Golden vectors: the catalogue in files for any language (docs/reference/vectors.md).

    ρ = 1, or 1/‖w‖ in the direction form      U = ρ⊙(W Aᵀ)      G = A Aᵀ      L = x Aᵀ
    z = x Vᵀ                                   dz = g⊙dy         e = Σ_tokens dy⊙z
    q = −m e / n³, and 0 where the norm is detached

These come in addition to the names of the reference. The bytes are the same on every machine.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from doraxp._base.safetensors import Tensor, write_header
from doraxp.testing._cases import FULL, Case, OptimizerCase
from doraxp.testing._catalogue import VERSION, catalogue
from doraxp.testing._conventions import AnyCase
from doraxp.testing._formulas import DenseFormulas
from doraxp.testing._operator_cases import OperatorCase, operator_catalogue
from doraxp.testing._operator_reference import expected_of_operator
from doraxp.testing._optimizer_cases import optimizer_catalogue
from doraxp.testing._reference import Expected, Results, bounded, shapes, step_results
from doraxp.testing._rounding import Portable
from doraxp.testing._sum_cases import SumCase, sum_catalogue, sum_results
from doraxp.testing._update_cases import UpdateCase, update_catalogue, update_results

FORMAT = 2
"""The version of the format. It goes up when a reader of the older format would fail. Readers of
format 2 pass over the kinds of cases that they do not know."""
MANIFEST = "manifest.json"
CHECKSUMS = "SHA256SUMS"
FILES = {dtype: f"{dtype}.safetensors" for dtype in FULL}


class Traced(DenseFormulas):
    """The reference, and the intermediates of an implementation that does not form V."""

    @cached_property
    def row_scale(self) -> Any:
        ones = Portable.exact(np.ones_like(self.m.value))
        return ones.over(self.w.norms()) if self.in_direction_form else ones

    @cached_property
    def u(self) -> Any:
        return self.row_scale * (self.w @ self.a.mT)

    @cached_property
    def gram(self) -> Any:
        return self.a @ self.a.mT

    @cached_property
    def low_rank(self) -> Any:
        return self.seen @ self.a.mT

    @cached_property
    def z(self) -> Any:
        z = self.seen @ self.v.mT
        if self.mask is None or not self.low_rank_dropout:
            return z
        return z + (self.x @ self.base.mT - self.seen @ self.base.mT)

    @cached_property
    def dz(self) -> Any:
        return self.dy * self.gain.mT

    @cached_property
    def e(self) -> Any:
        return self.dgain

    @cached_property
    def q(self) -> Any:
        exact = self.config.norm_gradient == "exact"
        return self.dnorm.over(self.n) if exact else 0.0 * self.dnorm


def write_vectors(out: Path, *, force: bool = False) -> int:
    """Write the catalogue with all values and bounds, for float32 and float64.

    Parameters
    ----------
    out : Path
        A folder that is empty or does not exist.
    force : bool
        Write into a folder with files too, and replace the files of the same names.

    Returns
    -------
    int
        The number of cases.

    Raises
    ------
    FileExistsError
        `out` is a file, or a folder with files and `force` is False.
    OSError
        The files cannot be written.
    """
    out = out.absolute()
    _check_target(out, force=force)
    # A temporary folder on the same disk: the files are then renamed, not copied.
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder:
        written = Path(folder) / "vectors"
        written.mkdir()
        count = _write(written)
        if out.exists():
            # A folder with a manifest is complete: remove it first, and write it last.
            (out / MANIFEST).unlink(missing_ok=True)
            for name in (*FILES.values(), CHECKSUMS, MANIFEST):
                (written / name).replace(out / name)
        else:
            written.rename(out)
    return count


def _check_target(out: Path, *, force: bool) -> None:
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out}: must be a folder, but is a file")
    if out.exists() and any(out.iterdir()) and not force:
        raise FileExistsError(f"{out}: must be empty; --force replaces the vectors in it")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"{out.parent}: no such folder")


def _write(folder: Path) -> int:
    """Write all files; return the number of cases."""
    everything: tuple[AnyCase, ...] = (
        *catalogue(), *operator_catalogue(), *update_catalogue(), *sum_catalogue(),
        *optimizer_catalogue(),
    )  # fmt: skip
    cases = [case for case in everything if set(FULL) <= set(case.dtypes)]
    entries = []
    for dtype, name in FILES.items():
        solved = [_solved(case, dtype) for case in cases]
        _write_tensors(folder / name, dict(_tensors(solved, dtype)))
        entries = [_entry(one) for one in solved]  # the same for each dtype
    manifest = {"format": FORMAT, "catalogue": VERSION, "files": FILES, "cases": entries}
    text = json.dumps(manifest, indent=1, ensure_ascii=False, allow_nan=False)
    (folder / MANIFEST).write_text(text + "\n", "utf-8", newline="\n")
    write_checksums(folder)
    return len(cases)


def write_checksums(folder: Path) -> None:
    """Write the SHA-256 of each file in a folder, as `sha256sum --check` reads them."""
    lines = [
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n"
        for path in sorted(folder.iterdir())
        if path.name != CHECKSUMS
    ]
    (folder / CHECKSUMS).write_text("".join(lines), "utf-8", newline="\n")


class Solved(NamedTuple):
    """A case in a dtype, with its expected results."""

    case: AnyCase
    inputs: dict[str, Any]
    wanted: dict[str, Expected]


def _solved(case: AnyCase, dtype: str) -> Solved:
    if isinstance(case, OperatorCase):
        return Solved(case, case.stored(dtype), expected_of_operator(case, dtype, Portable.exact))
    if isinstance(case, UpdateCase):
        results = update_results(case, dtype, number=Portable.exact)
        return Solved(case, case.stored(dtype), _all(results))
    if isinstance(case, SumCase):
        results = sum_results(case, dtype, number=Portable.exact)
        return Solved(case, case.stored(dtype), _all(results))
    if isinstance(case, Case):
        inputs = case.stored(dtype)
        layer = Traced(case.config, inputs, Portable.exact)
        like = shapes(case) | _more_shapes(case)
        wanted = {
            name: bounded(name, getattr(layer, name), shape, dtype) for name, shape in like.items()
        }
        return Solved(case, inputs, wanted)
    inputs = {name: array.astype(dtype) for name, array in case.params.items()}
    for t, grads in enumerate(case.grads, start=1):
        inputs |= {f"grad {name} {t}": array.astype(dtype) for name, array in grads.items()}
    return Solved(case, inputs, _all(step_results(case, dtype, number=Portable.exact)))


def _all(results: Results) -> dict[str, Expected]:
    return {name: results.of(name) for name in results.names}


def _more_shapes(case: Case) -> dict[str, tuple[int, ...]]:
    like = {name: array.shape for name, array in case.arrays.items()}
    rank = case.config.rank
    return {
        "row_scale": like["magnitude"],
        "v": like["weight"],
        "gain": like["magnitude"],
        "u": like["lora_b"],
        "gram": (*like["lora_a"][:-1], rank),
        "low_rank": (*like["x"][:-1], rank),
        "z": like["dy"],
        "dz": like["dy"],
        "e": like["magnitude"],
        "q": like["magnitude"],
    }


def _tensors(solved: list[Solved], dtype: str) -> Iterator[tuple[str, Any]]:
    """Yield the tensors, float64 first: then each starts at a multiple of its item size."""
    for case, _, wanted in solved:
        for name, want in wanted.items():
            yield f"{case.name}/expected/{name}", want.value.astype("<f8")
            yield f"{case.name}/bound/{name}", want.bound.astype("<f8")
    for case, inputs, _ in solved:
        for name, array in inputs.items():
            kind = "<i4" if array.dtype.kind == "i" else f"<f{np.dtype(dtype).itemsize}"
            yield f"{case.name}/inputs/{name}", array.astype(kind)


def _write_tensors(path: Path, arrays: dict[str, Any]) -> None:
    header = {
        name: Tensor(f"{array.dtype.kind.upper()}{8 * array.itemsize}", array.shape, array.nbytes)
        for name, array in arrays.items()
    }
    with path.open("wb") as file:
        write_header(file, header, {"doraxp_vectors": str(FORMAT)})
        for array in arrays.values():
            file.write(array.tobytes())


def _entry(solved: Solved) -> dict[str, Any]:
    """Return the entry of a case in the manifest."""
    case, inputs, wanted = solved
    names = {"inputs": list(inputs), "expected": list(wanted)}
    told = {"name": case.name, "reason": case.reason, "since": case.since}
    if isinstance(case, OptimizerCase):
        return {**told, "kind": case.optimizer, "numbers": dict(case.numbers), **names}
    if isinstance(case, SumCase):
        scalings = [config.scaling for config in case.configs]
        strengths = list(case.strengths)
        return {**told, "kind": "sum", "strengths": strengths, "scalings": scalings, **names}
    config = case.config
    numbers = case.numbers if isinstance(case, OperatorCase) else {}
    return {
        **told,
        "kind": "layer" if isinstance(case, Case) else case.kind,
        **numbers,
        "extreme": getattr(case, "extreme", False),
        "rank": config.rank,
        "alpha": config.alpha,
        "rslora": config.rslora,
        "scaling": config.scaling,
        "form": config.form,
        "norm_gradient": config.norm_gradient,
        "dropout": config.dropout if "dropout_mask" in inputs else None,
        **names,
    }
