"""`extract`: a DoRA adapter from a model and a full fine-tune of it, matrix by matrix."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, NamedTuple

import threadpoolctl

from doraxp._base.scalars import check_count
from doraxp._base.types import Adapter, Config
from doraxp._base.words import counted
from doraxp._core.updates import LowRank, UpdateAdapter
from doraxp.checkpoint._errors import CheckpointError
from doraxp.checkpoint._extract import Extracted, extract_layer
from doraxp.checkpoint._extract_plan import compare_names, relative_change
from doraxp.checkpoint._model import open_model
from doraxp.checkpoint._pair import WeightPair
from doraxp.checkpoint._updated_layer import AnyLayer, UpdatedLayer
from doraxp.layers import AdaptedLayer

_USUAL_PASSES = 16
"""The passes over a matrix that most need, for the progress."""

_ROUNDING = 1e-6
"""Part of ‖W* − W‖ that float32 does not resolve."""


class Closeness(NamedTuple):
    """How far the weight of one module is from TUNED's, in Frobenius norms."""

    update_norm: float
    """‖W* − W‖, the change by the fine-tune."""
    lora_error: float
    """‖W + B A − W*‖ of the truncated SVD of W* − W at the same rank."""
    error: float
    """‖W' − W*‖ of the adapter; never above `lora_error`, and equal to it for LoRA."""
    rank_for_tenth: int | None = None
    """The least known rank whose `lora_error` is at most a tenth of `update_norm`. None where the
    search did not meet one, as in a large matrix whose change is near to no low rank."""

    @property
    def ratio(self) -> float:
        """`error` / `lora_error`; 1 where the truncated SVD is exact, except for rounding."""
        is_exact = self.lora_error <= _ROUNDING * self.update_norm
        return 1.0 if is_exact else self.error / self.lora_error


class Extraction(NamedTuple):
    """An adapter, and how near it comes to the fine-tune."""

    adapters: dict[str, AdaptedLayer | UpdatedLayer]
    """By module path, for `save_adapters`; of the modules that differ."""
    closeness: dict[str, Closeness]
    """By module path."""
    equal: tuple[str, ...]
    """The modules that do not differ."""
    left_out: Mapping[str, float]
    """The tensors of TUNED that differ from BASE's and that the adapter lacks, with the relative
    change ‖after − before‖ / ‖before‖; infinity for new tensors, shapes or integers."""


def extract(
    base: str | os.PathLike[str],
    tuned: str | os.PathLike[str],
    rank: int,
    *,
    modules: str | None = None,
    jobs: int = 1,
    on_bytes: Callable[[int, int], object] = lambda done, total: None,
) -> Extraction:
    """Return the DoRA adapter of `base` that is near a full fine-tune of it.

    Each matrix and convolution ``NAME.weight`` that differs gets A, B and m, except embeddings. The
    memory needed is that of the adapters and of some blocks of each weight.

    Parameters
    ----------
    base, tuned : path
        A safetensors file or a model's folder. Shards and dtypes may differ, and names may not.
    rank : int
        Of each module; at most min(out, in). alpha is the same number, so s = 1.
    modules : str, optional
        A regular expression that the paths of the modules must contain.
    jobs : int
        Matrices at a time, each in a thread. The result is the same bit for bit.
    on_bytes : callable
        Called with the bytes of `base` that are done, by an estimate, and those of all matrices.

    Raises
    ------
    CheckpointError
        The models do not fit each other, a matrix is quantised or has NaN or infinity, or no
        matrix differs.
    OSError
        A file cannot be read.
    ValueError
        The rank is below 1.

    References
    ----------
    arXiv:2402.09353, equation 5, for W'.
    """
    check_count("rank", rank, least=1)
    before, after = open_model(Path(base)), open_model(Path(tuned))
    compared = compare_names(before, after, modules)
    changes = {name: relative_change(*pair) for name, pair in compared.others.items()}
    left_out = {name: change for name, change in changes.items() if change > 0}
    found = extracted(compared.matrices, rank, "dora", jobs, on_bytes, left_out)
    if not found.adapters:
        others = counted(len(left_out), "other tensor", "does")
        raise CheckpointError(
            f"{after.path}: no matrix differs from BASE's, and {others}: "
            "there is nothing to extract"
        )
    return found


def extracted(
    pairs: Mapping[str, WeightPair],
    rank: int,
    method: Literal["dora", "lora"],
    jobs: int,
    on_bytes: Callable[[int, int], object],
    left_out: Mapping[str, float],
) -> Extraction:
    """Return the adapters of pairs of weights, by module path; of those that differ."""
    check_count("rank", rank, least=1)
    progress = _Progress(pairs, on_bytes)
    found = _in_threads(pairs, rank, method, jobs, progress)
    moved = {path: one for path, one in found.items() if one.update_norm > 0}
    adapters = {path: _adapted(one, pairs[path]) for path, one in moved.items()}
    closeness = {
        path: Closeness(one.update_norm, one.lora_error, one.error, one.rank_for_tenth)
        for path, one in moved.items()
    }
    equal = tuple(path for path in found if path not in moved)
    return Extraction(adapters, closeness, equal, left_out)


def _adapted(one: Extracted, pair: WeightPair) -> AnyLayer:
    a, b, shape = one.lora_a, one.lora_b, pair.base.tensor.shape
    config = Config(len(a), alpha=len(a))
    if one.magnitude is not None:
        return AdaptedLayer(Adapter(a, b, one.magnitude), config, pair.kind, shape)
    if pair.kind.is_transposed:
        a, b = b.T, a.T
    return UpdatedLayer(UpdateAdapter(LowRank(a, b)), config, pair.kind, shape)


def _in_threads(
    pairs: Mapping[str, WeightPair],
    rank: int,
    method: Literal["dora", "lora"],
    jobs: int,
    progress: _Progress,
) -> dict[str, Extracted]:
    """Return the adapter of each pair, in their order."""

    def run(path: str) -> Extracted:
        pair = pairs[path]
        try:
            one = extract_layer(
                pair, rank, method=method, on_rows=lambda count: progress.add(path, count)
            )
        except FloatingPointError:
            raise CheckpointError(pair.fault()) from None
        progress.finish(path)
        return one

    # The order of a product's sums may depend on the number of BLAS threads.
    with threadpoolctl.threadpool_limits(1), ThreadPoolExecutor(jobs) as pool:
        tasks = {path: pool.submit(run, path) for path in pairs}
        try:
            return {path: task.result() for path, task in tasks.items()}
        finally:
            progress.stop()
            pool.shutdown(cancel_futures=True)


class _Progress:
    """Counts the bytes that are done, from several threads."""

    def __init__(
        self, pairs: Mapping[str, WeightPair], on_bytes: Callable[[int, int], object]
    ) -> None:
        self._sizes = {path: pair.base.tensor.nbytes for path, pair in pairs.items()}
        self._steps = {
            path: pair.base.tensor.nbytes / (pair.shape[0] * pair.shape[1] * _USUAL_PASSES)
            for path, pair in pairs.items()
        }
        self._done = dict.fromkeys(pairs, 0.0)
        self._total, self._sum = sum(self._sizes.values()), 0.0
        self._lock, self._stopped, self._on_bytes = threading.Lock(), False, on_bytes

    def add(self, path: str, count: int) -> None:
        """Count numbers of a matrix that were read; a pass beyond the usual ones counts nothing."""
        self._advance(path, min(self._done[path] + count * self._steps[path], self._sizes[path]))

    def finish(self, path: str) -> None:
        """Count a matrix as done."""
        self._advance(path, self._sizes[path])

    def stop(self) -> None:
        """Let each thread end at its next block."""
        self._stopped = True

    def _advance(self, path: str, done: float) -> None:
        if self._stopped:
            raise InterruptedError("the extraction was stopped")
        with self._lock:
            self._sum += done - self._done[path]
            self._done[path] = done
            self._on_bytes(int(self._sum), self._total)
