"""`doraxp audit`: a verdict on each tensor of a merged model, right or with a planted fault."""

from __future__ import annotations

import json
import re
import time

import ml_dtypes
import numpy as np
import pytest
from checkpoints import updated, write_json
from safetensors.numpy import load_file, save_file

from doraxp import AdaptedLayer, Adapter, Config, LayerKind
from doraxp._base.extras import install_hint
from doraxp.checkpoint import (
    CheckpointError,
    Options,
    _audit_parts,
    _audit_sample,
    _audit_ways,
    _formulas,
    _matrix,
    _precision,
    _slack,
    audit,
    plan_merge,
    run_merge,
    save_adapters,
)
from doraxp.cli import main
from doraxp.testing import right_merge, wrong_merges, wrong_merges_across_rows
from doraxp.testing._deviations import FORWARD
from doraxp.testing._formulas import DenseFormulas, deviating
from doraxp.testing._rounding import Plain
from doraxp.testing._wrong_merges import ACROSS_ROWS

RANK, ALPHA = 3, 7.5
S = ALPHA / RANK
KINDS = {
    "linear": (LayerKind(), (40, 24)),
    "square": (LayerKind(), (32, 32)),
    "conv": (LayerKind("conv"), (30, 5, 3, 2)),
    "embed_tokens": (LayerKind("embedding"), (60, 20)),
}
TRANSPOSED = {
    "c_attn": (LayerKind("transposed"), (20, 45)),
    "c_proj": (LayerKind("transposed"), (28, 28)),
}
DTYPES = ("float32", "bfloat16", "float16")
NORM = "model.norm.weight"
WEIGHT, PATH = "model.linear.weight", "model.linear"


def cast(array, dtype):
    return np.asarray(array).astype(dtype)


class Case:
    """A base, an adapter and a merged model on disk."""

    def __init__(self, folder, kinds, dtype, update=0.3, config=None):
        rng = np.random.default_rng(7)
        self.folder, self.dtype = folder, dtype
        self.base, self.layers = {}, {}
        for name, (kind, shape) in kinds.items():
            path, weight = f"model.{name}", cast(0.05 * rng.standard_normal(shape), dtype)
            self.base[f"{path}.weight"] = weight
            adapter = self.adapter(rng, kind.matrix(cast(weight, float)), update)
            self.layers[path] = AdaptedLayer(adapter, Config(RANK, ALPHA), kind, shape)
            if kind.name != "embedding":
                out = len(adapter.magnitude)
                self.base[f"{path}.bias"] = cast(rng.standard_normal(out), dtype)
        self.base[NORM] = cast(1 + 0.1 * rng.standard_normal(11), dtype)
        self.base["steps"] = np.arange(3)
        self.config = {"tie_word_embeddings": False} if config is None else config
        self.write("base", self.base)
        save_adapters(folder / "adapter", self.layers)

    @staticmethod
    def adapter(rng, matrix, update):
        """An adapter whose update is a part `update` of the matrix."""
        out, inner = matrix.shape
        a, b = rng.standard_normal((RANK, inner)), rng.standard_normal((out, RANK))
        b *= update * np.linalg.norm(matrix) / np.linalg.norm(S * (b @ a))
        m = np.linalg.norm(matrix, axis=1) * (1 + update * rng.standard_normal(out))
        return Adapter(*(cast(leaf, "float32") for leaf in (a, b, m)))

    def write(self, name, tensors, shards=1):
        """Write a model's folder."""
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        weight_map, names = {}, sorted(tensors)
        for shard in range(shards):
            part = {one: np.ascontiguousarray(tensors[one]) for one in names[shard::shards]}
            save_file(part, folder / f"model-{shard}.safetensors", {"format": "pt"})
            weight_map |= dict.fromkeys(part, f"model-{shard}.safetensors")
        if shards > 1:
            write_json(folder / "model.safetensors.index.json", {"weight_map": weight_map})
        write_json(folder / "config.json", self.config)

    def merged(self, path, formula=lambda v, m, w: m / np.linalg.norm(v, axis=1)[:, None] * v,
               *, adapter=None, s=S, weight=None, step=lambda x: x):  # fmt: skip
        """W' by a formula of V, m (out, 1) and W, stored; each step rounded by `step`."""
        layer = self.layers[path]
        stored = self.base[f"{path}.weight"] if weight is None else weight
        w = np.asarray(layer.kind.matrix(cast(stored, float)))
        a, b, m = (step(cast(leaf, float)) for leaf in adapter or layer.adapter)
        result = formula(step(w + step(s * step(b @ a))), m[:, None], w)
        return cast(layer.kind.restore(result, stored.shape), self.dtype)

    def whole(self, **changes):
        """The right tensors of the merged model, with changes by name; None leaves one out."""
        weights = {f"{path}.weight": self.merged(path) for path in self.layers}
        tensors = self.base | weights | {name.replace("__", "."): t for name, t in changes.items()}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}

    def audit(self, tensors, shards=1, **options):
        self.write("merged", tensors, shards)
        plan = plan_merge(self.folder / "base", self.folder / "adapter", Options())
        return audit(plan, self.folder / "merged", **options)

    def fault(self, name, tensor):
        """The verdict on one changed tensor; the others must be right."""
        verdicts = self.audit(self.whole() | {name: tensor})
        others = {n: v.verdict for n, v in verdicts.items() if n != name and not v.right}
        assert others == {}
        assert not verdicts[name].right
        return verdicts[name].verdict


@pytest.fixture(params=[(kinds, dtype) for kinds in (0, 1) for dtype in DTYPES],
                ids=lambda p: f"{('layers', 'Conv1D')[p[0]]}-{p[1]}")  # fmt: skip
def case(request, tmp_path):
    kinds, dtype = request.param
    return Case(tmp_path, (KINDS, TRANSPOSED)[kinds], dtype)


def gain(v, m):
    return m / np.linalg.norm(v, axis=1)[:, None]


def small(tmp_path, dtype="float32", update=0.3, **options):
    return Case(tmp_path, {"linear": (LayerKind(), (40, 24))}, dtype, update, **options)


# Right models


def test_our_merge_is_exact_and_the_rest_is_equal(case):
    plan = plan_merge(case.folder / "base", case.folder / "adapter", Options())
    run_merge(plan, case.folder / "merged")
    verdicts = audit(plan, case.folder / "merged")
    assert list(verdicts) == list(plan.tasks)  # and in that order
    for name, verdict in verdicts.items():
        is_merged = name.removesuffix(".weight") in case.layers
        assert verdict.verdict == ("exact" if is_merged else "equal"), name
        assert verdict.right
        if is_merged:
            assert verdict.error == 0
            assert 0.99 < verdict.kept < 1.01


@pytest.mark.parametrize("update", [0.3, 3e-3, 3e-4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_merge_whose_steps_are_rounded_to_the_dtype_is_right(tmp_path, dtype, update):
    """So PEFT merges in 16 bits."""
    case = Case(tmp_path, KINDS, dtype, update)

    def step(x):
        return cast(cast(x, dtype), float)

    def formula(v, m, w):
        return step(m / step(np.linalg.norm(v, axis=1))[:, None]) * v

    weights = {f"{p}.weight": case.merged(p, formula, step=step) for p in case.layers}
    for name, verdict in case.audit(case.whole() | weights).items():
        assert verdict.right or verdict.verdict == "kept in part", name


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("update", [0.3, 3e-3, 3e-4])
def test_a_merge_of_an_adapter_in_16_bits_is_right(tmp_path, dtype, update):
    """Many gains are 1 then, as in LoRA."""
    case = Case(tmp_path, KINDS, dtype, update)

    def step(x):
        return cast(cast(x, dtype), float)

    def formula(v, m, w):
        return step(m / step(np.linalg.norm(v, axis=1))[:, None]) * v

    for path, layer in case.layers.items():
        narrow = Adapter(*(cast(leaf, dtype) for leaf in layer.adapter))
        case.layers[path] = layer._replace(adapter=narrow)
    save_adapters(tmp_path / "narrow", case.layers)
    weights = {f"{p}.weight": case.merged(p, formula, step=step) for p in case.layers}
    case.write("merged", case.base | weights)
    plan = plan_merge(tmp_path / "base", tmp_path / "narrow", Options())
    for name, verdict in audit(plan, tmp_path / "merged").items():
        assert verdict.right or verdict.verdict == "kept in part", name


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(("kinds", "path"), [(KINDS, PATH), (TRANSPOSED, "model.c_attn")])
def test_the_error_is_in_units_of_the_bound(tmp_path, monkeypatch, kinds, path, dtype):
    """The bound of every number, for rows that are tiny, cancel, or have a tiny m."""
    monkeypatch.setattr(_matrix, "BLOCK", 90)
    case = Case(tmp_path, kinds, dtype)
    layer, name = case.layers[path], f"{path}.weight"
    a, b, m = (cast(leaf, float) for leaf in layer.adapter)
    w = np.array(layer.kind.matrix(cast(case.base[name], float)))
    a[:, 2] *= 8  # a column apart from the others
    w[3], b[3] = w[3] * 1e-4, b[3] * 1e-4
    w[5] = -S * (b[5] @ a) * 1.01
    m[7] = 3e-5
    adapter = Adapter(*(cast(leaf, "float32") for leaf in (a, b, m)))
    a, b, m = (cast(leaf, float) for leaf in adapter)
    case.base[name] = cast(layer.kind.restore(w, layer.shape), dtype)
    case.layers[path] = layer._replace(adapter=adapter)
    case.write("base", case.base)
    save_adapters(tmp_path / "other", case.layers)
    plan = plan_merge(tmp_path / "base", tmp_path / "other", Options())
    w = np.array(layer.kind.matrix(cast(case.base[name], float)))
    v = w + S * (b @ a)
    norm, length = np.linalg.norm(v, axis=1), np.linalg.norm(b, axis=1)
    g, info = m / norm, ml_dtypes.finfo(dtype)
    eps, least = float(info.eps), float(info.smallest_normal)
    sums = 2**-24 * (a.shape[1] ** 0.5 + RANK**0.5) / eps
    lost = least * RANK**0.5
    length, columns = length + lost, np.linalg.norm(a, axis=0) + lost
    c = 4 + sums + 2.5 * S * length * np.linalg.norm(columns) / norm
    c += least * ((1 + S) / norm + 1 / m + 1 / g)
    reach = (2.5 + sums) * (g * S * length)[:, None] * columns
    right = g[:, None] * v
    bound = eps * (c[:, None] * np.abs(right) + reach + least * (1 + g[:, None] * (1 + S)))
    for row, column in [(3, 0), (5, 2), (7, 1), (9, 2), (9, 3), (len(m) - 1, a.shape[1] - 1)]:
        wrong = right.copy()
        wrong[row, column] += 20 * bound[row, column]
        stored = cast(layer.kind.restore(wrong, layer.shape), dtype)
        case.write("merged", case.base | {name: stored})
        error = audit(plan, tmp_path / "merged")[name].error
        actual = np.abs(np.array(layer.kind.matrix(cast(stored, float))) - right) / bound
        assert error == pytest.approx(actual.max(), rel=1e-3), (row, column)
        assert error == pytest.approx(20, rel=0.1)


def test_the_bound_is_finite_where_n_is_tiny(tmp_path):
    """A bound that is NaN would be an error of every number."""
    slack = _slack.Slack(updated(small(tmp_path).layers[PATH]), _precision.PRECISION["BF16"])
    norm = np.full(40, 1e-60)
    assert np.isfinite(slack.bound(np.zeros((40, 24), np.float32), slice(None), norm)).all()


def test_a_last_rounding_that_is_stochastic_is_right(tmp_path):
    case = small(tmp_path, "bfloat16", 3e-3)
    noise = np.random.default_rng(0).integers(0, 1 << 16, (40, 24), np.uint32)
    wide = case.merged(PATH)
    case.dtype = "float32"
    bits = (case.merged(PATH).view(np.uint32) + noise) & np.uint32(0xFFFF0000)
    stochastic = bits.view(np.float32).astype("bfloat16")
    assert np.mean(stochastic != wide) > 0.2
    case.dtype = "bfloat16"
    assert case.audit(case.whole() | {WEIGHT: stochastic})[WEIGHT].verdict == "rounded"


def rounds_to(dtype):
    return lambda x: cast(cast(x, dtype), float)


def in_mixed_dtypes(case, path, loaded, product, rest, saved, formula=None, s=S):
    """W' by the dtypes of W in memory, of s B A, of the other steps, and of the file."""
    layer, stored = case.layers[path], case.base[f"{path}.weight"]
    w = rounds_to(loaded)(np.asarray(layer.kind.matrix(cast(stored, float))))
    a, b, m = (cast(leaf, float) for leaf in layer.adapter)
    v = rounds_to(rest)(w + rounds_to(product)(s * rounds_to(product)(b @ a)))
    g = rounds_to(rest)(m / rounds_to(rest)(np.linalg.norm(v, axis=1)))[:, None]
    result = rounds_to(rest)(formula(v, m[:, None], w) if formula else g * v)
    return cast(layer.kind.restore(result, stored.shape), saved)


def narrow(case, dtype):
    """Round the adapters to a dtype, and write them."""
    for path, layer in case.layers.items():
        adapter = Adapter(*(cast(leaf, dtype) for leaf in layer.adapter))
        case.layers[path] = layer._replace(adapter=adapter)
    save_adapters(case.folder / "narrow", case.layers)
    (case.folder / "adapter").rename(case.folder / "wide")
    (case.folder / "narrow").rename(case.folder / "adapter")


F32, F16, BF16 = "float32", "float16", "bfloat16"
MIXED = {
    "PEFT, an adapter of 16 bits": (F32, BF16, F32, BF16, F32, F32),
    "the same in float16": (F32, F16, F32, F16, F32, F32),
    "two dtypes of 16 bits": (BF16, F16, BF16, F16, F32, BF16),
    "in bfloat16, saved as float32": (BF16, BF16, BF16, BF16, BF16, F32),
    "files of float32, in bfloat16": (F32, F32, BF16, BF16, BF16, F32),
    "files of float32, loaded in float16": (F32, F32, F16, F32, F32, F16),
    "all but the last step in bfloat16": (BF16, BF16, BF16, BF16, BF16, F16),
}
"""Dtypes: of W, of the adapter, of W as loaded, of s B A, of the other steps, of S."""


@pytest.mark.parametrize("mix", MIXED)
@pytest.mark.parametrize("update", [0.3, 3e-3, 3e-4, 1e-4])
def test_a_merge_through_several_dtypes_is_right(tmp_path, mix, update):
    weight, adapter, *rest = MIXED[mix]
    case = Case(tmp_path, KINDS, weight, update)
    narrow(case, adapter)
    weights = {f"{p}.weight": in_mixed_dtypes(case, p, *rest) for p in case.layers}
    for name, verdict in case.audit(case.whole() | weights).items():
        assert verdict.right or verdict.verdict == "kept in part", (name, verdict)


@pytest.mark.parametrize("update", [0.3, 3e-3, 3e-4])
@pytest.mark.parametrize("mix", list(MIXED)[:5])
def test_a_fault_in_a_merge_through_several_dtypes_is_found(tmp_path, mix, update):
    weight, adapter, *rest = MIXED[mix]
    case = Case(tmp_path, {"linear": (LayerKind(), (96, 120))}, weight, update)
    narrow(case, adapter)
    right = in_mixed_dtypes(case, PATH, *rest)

    def verdict(tensor):
        return case.audit(case.base | {WEIGHT: tensor})[WEIGHT]

    assert verdict(in_mixed_dtypes(case, PATH, *rest, lambda v, m, w: v)).verdict == "plain LoRA"
    assert verdict(in_mixed_dtypes(case, PATH, *rest, s=S**2)).verdict == "scaled by s²"
    assert verdict(cast(case.base[WEIGHT], right.dtype)).verdict == "unchanged"
    w = cast(case.base[WEIGHT], float)
    case.layers[PATH] = case.layers[PATH]._replace(
        adapter=case.adapter(np.random.default_rng(1), w, update)
    )
    other = verdict(in_mixed_dtypes(case, PATH, *rest))
    assert other.verdict == "another adapter"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_more_than_the_whole_update_is_another_adapter(tmp_path, dtype, stored):
    """No number is beyond the rounding errors of 16 bits."""
    case = Case(tmp_path, {"linear": (LayerKind(), (96, 120))}, stored, 1e-3)
    narrow(case, dtype)
    w = cast(case.base[WEIGHT], float)
    case.dtype = "float64"
    more = w + 1.3 * (case.merged(PATH) - w)
    assert case.audit(case.base | {WEIGHT: cast(more, stored)})[WEIGHT].verdict == "another adapter"


def test_a_few_numbers_far_off_are_damage_in_any_mixture_of_dtypes(tmp_path):
    case = Case(tmp_path, {"linear": (LayerKind(), (96, 120))}, "float32", 0.3)
    narrow(case, "bfloat16")
    right = in_mixed_dtypes(case, PATH, *MIXED["PEFT, an adapter of 16 bits"][2:])
    exact = case.merged(PATH)
    for weight in (right, exact):
        weight[5, :20] += 0.3 * np.abs(weight).max()
        verdict = case.audit(case.base | {WEIGHT: weight})[WEIGHT]
        assert (verdict.verdict, verdict.detail) == ("damaged", "20 of 11,520 numbers")
    exact = case.merged(PATH)
    exact[5, 7] *= 1.001  # less than a step of bfloat16, and 8000 steps of float32
    assert case.audit(case.base | {WEIGHT: exact})[WEIGHT].verdict == "damaged"


@pytest.mark.parametrize("alpha", [4.0, 64.0])
def test_products_that_underflow_and_a_large_s_are_right(tmp_path, alpha):
    """s multiplies what s B A lost to underflow."""
    rng = np.random.default_rng(3)
    w = cast(0.02 * rng.standard_normal((64, 96)), "float16")
    w[-4:] = 0
    step, s = rounds_to("float16"), alpha / 2
    a, b = 0.05 * rng.standard_normal((2, 96)), 2e-4 / s * rng.standard_normal((64, 2))
    a, b = step(a), step(b)
    m = step(1.01 * np.linalg.norm(cast(w, float) + s * b @ a, axis=1))
    v = step(cast(w, float) + step(s * step(b @ a)))
    merged = step(step(m / step(np.linalg.norm(v, axis=1)))[:, None] * v)
    case = small(tmp_path, "float16")
    adapter = Adapter(*(cast(leaf, "float16") for leaf in (a, b, m)))
    case.layers = {PATH: AdaptedLayer(adapter, Config(2, alpha), LayerKind(), w.shape)}
    case.base = {WEIGHT: w}
    case.write("base", case.base)
    save_adapters(tmp_path / "other", case.layers)
    case.write("merged", {WEIGHT: cast(merged, "float16")})
    plan = plan_merge(tmp_path / "base", tmp_path / "other", Options())
    assert audit(plan, tmp_path / "merged")[WEIGHT].right


@pytest.mark.parametrize(
    ("stored", "weight", "adapter", "loaded"),
    [
        ("F16", "F32", "BF16", ("F32", "BF16")),  # as in the files
        ("F16", "F32", "BF16", ("F16", "BF16")),  # the model as it is saved
        ("BF16", "F32", "F32", ("BF16", "F32")),
        ("BF16", "F32", "F32", ("BF16", "BF16")),
        ("F32", "F32", "BF16", ("BF16", "F32")),  # the model as the adapter
        ("F32", "F32", "BF16", ("BF16", "BF16")),
    ],
)
def test_every_way_to_load_a_model_and_its_adapter_is_tried(stored, weight, adapter, loaded):
    dtypes = _audit_sample.Dtypes(stored, weight, adapter, adapter, adapter)
    model, other = (_audit_ways.DTYPES[name] for name in loaded)
    assert (model, other, other, other) in _audit_ways.ways(dtypes)


def test_files_of_32_bits_have_no_step_of_16_bits():
    assert _audit_ways.ways(_audit_sample.Dtypes(*["F32"] * 5)) == []


def test_products_that_underflow_in_a_finer_dtype_are_right(tmp_path):
    """float16 has fewer small numbers than bfloat16, which S has."""
    case = Case(tmp_path, {"linear": (LayerKind(), (127, 120))}, "bfloat16", 3e-5)
    case.base[WEIGHT][:, 7] = 1e-6
    case.write("base", case.base)
    w, half = cast(case.base[WEIGHT], float), rounds_to("float16")
    a, b, _ = (cast(leaf, float) for leaf in case.layers[PATH].adapter)
    a[:, 7] *= 0.3
    b *= S / 64
    m = np.linalg.norm(w + 64 * b @ a, axis=1)
    layer = case.layers[PATH]._replace(adapter=Adapter(a, b, m), config=Config(RANK, 64.0 * RANK))
    case.layers[PATH] = layer
    narrow(case, "float16")
    a, b, m = (cast(leaf, float) for leaf in case.layers[PATH].adapter)
    v = w + half(64 * half(b @ a))
    merged = cast(gain(v, m[:, None]) * v, "bfloat16")
    verdict = case.audit(case.base | {WEIGHT: merged})[WEIGHT]
    assert verdict.right or verdict.verdict == "kept in part", verdict


def test_an_error_of_the_last_digit_is_rounded(tmp_path):
    case = small(tmp_path)
    weight = case.merged(PATH)
    weight[3, 5] = np.nextafter(weight[3, 5], np.float32(9))
    verdict = case.audit(case.whole() | {WEIGHT: weight})[WEIGHT]
    assert verdict.verdict == "rounded"
    assert 0 < verdict.error < 0.5


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_fresh_adapter_leaves_the_weight_unchanged_and_is_right(tmp_path, dtype):
    case = small(tmp_path, dtype, update=0.0)
    verdict = case.audit(case.base)[WEIGHT]
    assert verdict.right
    assert verdict.kept == 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_cancel_are_right_and_rows_without_a_direction_are_0(tmp_path, dtype):
    case = small(tmp_path, dtype)
    layer = case.layers[PATH]
    weight = cast(case.base[WEIGHT], float)
    a, b, m = (np.array(leaf, float) for leaf in layer.adapter)
    weight[0], b[0] = 0, 0  # n is 0
    weight[1] = -S * (b[1] @ a) * (1 + 0.02 * np.random.default_rng(0).standard_normal(24))
    adapter = Adapter(*(cast(leaf, "float32") for leaf in (a, b, m)))
    case.base[WEIGHT] = cast(weight, dtype)
    case.layers[PATH] = layer._replace(adapter=adapter)
    case.write("base", case.base)
    save_adapters(case.folder / "other", case.layers)
    plan = plan_merge(case.folder / "base", case.folder / "other", Options())

    def formula(v, m, w):
        norm = np.linalg.norm(v, axis=1)[:, None]
        return np.divide(m * v, norm, out=np.zeros_like(v), where=norm > 0)

    case.write("merged", case.base | {WEIGHT: case.merged(PATH, formula)})
    assert audit(plan, case.folder / "merged")[WEIGHT].right
    broken = case.merged(PATH, formula)
    broken[0] = np.nan
    case.write("merged", case.base | {WEIGHT: broken})
    verdict = audit(plan, case.folder / "merged")[WEIGHT]
    assert verdict.verdict == "NaN or infinity"
    assert verdict.detail == "24 numbers: the 1 row whose norm n is 0, where W' is 0"
    broken[1, 0] = np.nan
    case.write("merged", case.base | {WEIGHT: broken})
    assert audit(plan, case.folder / "merged")[WEIGHT].detail == "25 numbers"


@pytest.mark.parametrize("shards", [1, 2, 3])
@pytest.mark.parametrize("jobs", [1, 3])
def test_shards_and_threads_change_no_verdict(tmp_path, shards, jobs):
    case = Case(tmp_path, KINDS, "bfloat16")
    wrong = case.whole() | {WEIGHT: case.base[WEIGHT]}
    counted = []
    verdicts = case.audit(wrong, shards, jobs=jobs, on_bytes=counted.append)
    assert {name for name, verdict in verdicts.items() if not verdict.right} == {WEIGHT}
    assert sum(counted) == sum(tensor.nbytes for tensor in case.base.values())


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
def test_another_dtype_for_every_tensor_is_right(tmp_path, dtype):
    case = Case(tmp_path, KINDS, "bfloat16")
    plan = plan_merge(
        case.folder / "base",
        case.folder / "adapter",
        Options(dtype={"float64": "F64", "float32": "F32", "float16": "F16"}[dtype]),
    )
    run_merge(plan, case.folder / "merged")
    verdicts = audit(plan, case.folder / "merged")
    assert {verdict.verdict for verdict in verdicts.values()} == {"exact", "converted", "equal"}
    assert verdicts[NORM].verdict == "converted"


def test_names_may_differ_by_one_leading_name(tmp_path):
    case = Case(tmp_path, KINDS, "float32")
    whole = case.whole()
    longer = {f"base.{name}": tensor for name, tensor in whole.items()}
    shorter = {name.removeprefix("model."): tensor for name, tensor in whole.items()}
    for tensors in (longer, shorter):
        verdicts = case.audit(tensors)
        assert verdicts.keys() == case.base.keys()
        assert all(verdict.right for verdict in verdicts.values())


def test_a_name_that_loses_its_lead_to_another_tensor_is_extra(tmp_path):
    case = small(tmp_path)
    verdicts = case.audit(case.whole() | {"norm.weight": case.base[NORM]})
    assert verdicts["norm.weight"].verdict == "extra"
    assert sum(not verdict.right for verdict in verdicts.values()) == 1
    shorter = {name.removeprefix("model."): tensor for name, tensor in case.whole().items()}
    verdicts = case.audit(shorter | {NORM: case.base[NORM] + 1})
    assert not all(verdict.right for verdict in verdicts.values())


def test_tensors_of_one_side_are_in_the_order_of_their_file(tmp_path):
    case = small(tmp_path)
    extra = [f"more.{i}" for i in range(8)]
    verdicts = case.audit(case.whole() | dict.fromkeys(extra, case.base[NORM]))
    assert [name for name, verdict in verdicts.items() if verdict.verdict == "extra"] == extra


@pytest.mark.parametrize("name", [NORM, WEIGHT])
def test_one_tensor_without_its_leading_name_is_missing(tmp_path, name):
    case = small(tmp_path)
    whole = case.whole()
    whole[name.removeprefix("model.")] = whole.pop(name)
    verdicts = case.audit(whole)
    wrong = {name: verdict.verdict for name, verdict in verdicts.items() if not verdict.right}
    assert wrong == {name: "missing", name.removeprefix("model."): "extra"}


@pytest.mark.parametrize("longer", [False, True])
def test_one_tensor_that_keeps_the_leading_name_of_the_base_is_missing(tmp_path, longer):
    case = small(tmp_path)
    others = {name: tensor for name, tensor in case.whole().items() if name != NORM}
    change = (lambda n: f"base.{n}") if longer else (lambda n: n.removeprefix("model."))
    renamed = {change(name): tensor for name, tensor in others.items()}
    assert not all(v.right for v in case.audit(renamed | {NORM: case.base[NORM]}).values())


def test_a_head_may_lack_the_leading_name_of_the_other_tensors(tmp_path):
    case = Case(tmp_path, {"embed_tokens": KINDS["embed_tokens"]}, "float32")
    del case.base["steps"]
    case.base |= {"lm_head.weight": np.ones((60, 20), np.float32)}
    case.write("base", case.base)
    shorter = {name.removeprefix("model."): tensor for name, tensor in case.whole().items()}
    assert all(verdict.right for verdict in case.audit(shorter).values())
    case.write("base", {n.removeprefix("model."): t for n, t in case.base.items()})
    assert all(verdict.right for verdict in case.audit(case.whole()).values())


def test_two_heads_under_one_name_are_not_right(tmp_path):
    case = Case(tmp_path, {"embed_tokens": KINDS["embed_tokens"]}, "float32", config=TIED)
    del case.base["steps"]
    case.write("base", {n.removeprefix("model."): t for n, t in case.base.items()})
    head = case.base["model.embed_tokens.weight"]
    heads = {"lm_head.weight": head, "model.lm_head.weight": head}
    assert all(v.right for v in case.audit(case.whole() | {"lm_head.weight": head}).values())
    assert not all(v.right for v in case.audit(case.whole() | heads).values())


# Faults of a weight


FAULTS = {
    "plain LoRA": lambda v, m, w: v,
    "base norm": lambda v, m, w: m / np.linalg.norm(w, axis=1)[:, None] * v,
    "m/n is applied twice": lambda v, m, w: gain(v, m) ** 2 * v,
    "the update is left out": lambda v, m, w: m / np.linalg.norm(w, axis=1)[:, None] * w,
    "the norm is that of the whole matrix": lambda v, m, w: m / np.linalg.norm(v) * v,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_gain_is_named(case, fault):
    for path in case.layers:
        is_square = len(set(case.layers[path].kind.matrix_shape(case.layers[path].shape))) == 1
        if "whole" not in fault or is_square:
            wrong = case.merged(path, FAULTS[fault])
            assert case.fault(f"{path}.weight", wrong) == fault


@pytest.mark.parametrize(
    ("fault", "s"), [("scaled by s²", S**2), ("α instead of s", ALPHA), ("s is left out", 1.0)]
)
def test_a_wrong_s_is_named(case, fault, s):
    for path in case.layers:
        assert case.fault(f"{path}.weight", case.merged(path, s=s)) == fault


def test_a_weight_that_was_merged_twice_is_named(case):
    for path in case.layers:
        wrong = case.merged(path, weight=case.merged(path))
        assert case.fault(f"{path}.weight", wrong) == "merged twice"


def test_a_weight_that_was_not_merged_is_named(case):
    for path in case.layers:
        assert case.fault(f"{path}.weight", case.base[f"{path}.weight"]) == "unchanged"


def test_a_weight_that_changed_outside_of_the_sample_is_not_called_unchanged(tmp_path, monkeypatch):
    monkeypatch.setattr(_audit_sample, "_NUMBERS", 1)
    case = small(tmp_path)
    weight = case.base[WEIGHT].copy()
    weight[1] = 0  # the sample has every second or third of 40 rows
    assert case.fault(WEIGHT, weight) == "another adapter"


@pytest.mark.parametrize(("kinds", "path"), [(KINDS, "model.square"), (TRANSPOSED, "model.c_proj")])
def test_a_norm_over_the_other_axis_is_named(tmp_path, kinds, path):
    case = Case(tmp_path, kinds, "float32")
    by_column = case.merged(path, lambda v, m, w: m.T / np.linalg.norm(v, axis=0) * v)
    assert case.fault(f"{path}.weight", by_column) == "norm over the other axis"
    by_row = case.merged(path, lambda v, m, w: m / np.linalg.norm(v, axis=0)[:, None] * v)
    assert case.fault(f"{path}.weight", by_row) == "norm over the other axis"


def test_a_transposed_weight_is_named(case):
    for path, layer in case.layers.items():
        if len(layer.shape) == 2:
            wrong = np.ascontiguousarray(case.merged(path).T)
            assert case.fault(f"{path}.weight", wrong) == "transposed"


@pytest.mark.parametrize(("steps", "verdict"), [(2, "transposed"), (8, "another shape")])
def test_a_transposed_weight_may_differ_by_a_few_roundings(tmp_path, steps, verdict):
    case = Case(tmp_path, KINDS, "float32")
    path = next(path for path, layer in case.layers.items() if len(set(layer.shape)) == 2)
    wrong = case.merged(path).T * np.float32(1 + steps * 2.0**-23)
    assert case.fault(f"{path}.weight", np.ascontiguousarray(wrong)) == verdict


def test_the_merge_of_another_adapter_is_told_from_every_formula(case):
    rng = np.random.default_rng(1)
    for path, layer in case.layers.items():
        matrix = layer.kind.matrix(cast(case.base[f"{path}.weight"], float))
        wrong = case.merged(path, adapter=case.adapter(rng, matrix, 0.3))
        assert case.fault(f"{path}.weight", wrong) == "another adapter"


def test_two_formulas_that_give_the_same_numbers_are_both_named(tmp_path):
    """For s = 1/2, both s² and s/2."""
    case = small(tmp_path)
    layer = case.layers[PATH]
    config = Config(RANK, RANK**0.5)  # 1/s = √rank and α: two deviations with the same s
    save_adapters(tmp_path / "other", {PATH: layer._replace(config=config)})
    case.write("merged", case.base | {WEIGHT: case.merged(PATH, s=RANK**0.5)})
    plan = plan_merge(tmp_path / "base", tmp_path / "other", Options())
    verdict = audit(plan, tmp_path / "merged")[WEIGHT].verdict
    assert verdict == "α instead of s or 1/s where s belongs"


@pytest.mark.parametrize("dtype", DTYPES)
def test_some_damaged_numbers_are_counted(tmp_path, dtype):
    case = small(tmp_path, dtype)
    weight = case.merged(PATH)
    row, column = np.unravel_index(np.abs(cast(weight, float)).argmax(), weight.shape)
    epsilon = float(ml_dtypes.finfo(weight.dtype).eps)
    weight[row, column] = cast(cast(weight[row, column], float) * (1 + 40 * epsilon), dtype)
    verdict = case.audit(case.whole() | {WEIGHT: weight})[WEIGHT]
    assert (verdict.verdict, verdict.detail) == ("damaged", "1 of 960 numbers")
    assert verdict.error > 1


@pytest.mark.parametrize(("dtype", "update"), [("bfloat16", 3e-4), ("bfloat16", 0), ("float32", 0)])
def test_damage_to_a_weight_that_hardly_changed_is_not_another_adapter(tmp_path, dtype, update):
    case = Case(tmp_path, {"linear": (LayerKind(), (120, 200))}, dtype, update)
    weight = case.merged(PATH) if update else case.base[WEIGHT].copy()
    weight[5, :20] = 1
    verdict = case.audit(case.whole() | {WEIGHT: weight})[WEIGHT]
    assert (verdict.verdict, verdict.detail) == ("damaged", "20 of 24,000 numbers")


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_are_named(tmp_path, dtype, value):
    case = small(tmp_path, dtype)
    weight = case.merged(PATH)
    weight[3, 4] = value
    assert case.fault(WEIGHT, weight) == "NaN or infinity"


def test_another_shape_and_another_dtype_are_named(tmp_path):
    case = small(tmp_path)
    right = case.merged(PATH)
    assert case.fault(WEIGHT, right[:, 1:]) == "another shape"
    assert case.fault(WEIGHT, right.T * 2) == "another shape"
    assert case.fault(WEIGHT, right.astype(np.int8)) == "another dtype"
    assert case.fault(NORM, case.base[NORM].astype(np.int8)) == "another dtype"
    assert case.fault(NORM, case.base[NORM][1:]) == "another shape"


# A fault in a part of a weight


def in_a_part(case, formula, rows=slice(None), columns=slice(None), **options):
    """The right merge, with a part of it by another formula."""
    weight = case.merged(PATH, **options)
    weight[rows, columns] = case.merged(PATH, formula, **options)[rows, columns]
    return weight


@pytest.mark.parametrize(("dtype", "update"), [("bfloat16", 5e-3), ("float16", 1e-3)])
@pytest.mark.parametrize("part", [0.02, 0.1, 0.4])
def test_m_left_out_in_some_rows_is_named(tmp_path, dtype, update, part):
    """No number is off by more than a right merge's may be."""
    case = Case(tmp_path, {"linear": (LayerKind(), (400, 200))}, dtype, update)
    rows = slice(100, 100 + int(400 * part))
    verdicts = case.audit(case.whole() | {WEIGHT: in_a_part(case, FAULTS["plain LoRA"], rows)})
    assert verdicts[WEIGHT].verdict == "plain LoRA"
    assert re.fullmatch(r"rows \d+ to \d+ of 400", verdicts[WEIGHT].detail)
    first, last = map(int, re.findall(r"\d+", verdicts[WEIGHT].detail)[:2])
    assert rows.start - 8 <= first < last <= rows.stop + 8


@pytest.mark.parametrize("in_steps", [False, True])
def test_columns_that_were_not_merged_are_named(tmp_path, in_steps):
    """As where one of several machines, each with some columns, did nothing."""
    case = Case(tmp_path, {"linear": (LayerKind(), (400, 200))}, "bfloat16", 5e-3)
    step = rounds_to("bfloat16") if in_steps else lambda x: x
    weight = in_a_part(case, lambda v, m, w: w, columns=slice(150, 175), step=step)
    verdict = case.audit(case.whole() | {WEIGHT: weight})[WEIGHT]
    assert verdict.verdict == "unchanged"
    assert re.fullmatch(r"columns \d+ to \d+ of 200", verdict.detail)


def test_rows_of_steps_in_16_bits_without_m_are_named(tmp_path):
    case = Case(tmp_path, {"linear": (LayerKind(), (400, 200))}, "bfloat16", 2e-2)
    step = rounds_to("bfloat16")
    weight = in_a_part(case, lambda v, m, w: v, slice(128, 256), step=step)
    assert case.fault(WEIGHT, weight) == "plain LoRA"


@pytest.mark.parametrize(
    ("kind", "update"),
    [
        ("one step of n", 5e-3),
        ("one step of n", 3e-4),
        ("stochastic", 5e-3),
        ("stochastic", 3e-4),
        ("m / n alone", 5e-3),
    ],
)
def test_rounding_that_no_formula_knows_is_not_a_fault_of_a_part(tmp_path, kind, update):
    case = Case(tmp_path, {"linear": (LayerKind(), (400, 200))}, "bfloat16", update)
    rng, eps, step = np.random.default_rng(5), 2.0**-7, rounds_to("bfloat16")
    for _ in range(4):
        if kind == "one step of n":
            off = 1 + eps * rng.integers(-1, 2, (400, 1))
            weight = case.merged(
                PATH, lambda v, m, w, off=off: step(m / step(off * gain(v, 1) ** -1)) * v, step=step
            )
        elif kind == "stochastic":
            case.dtype = "float32"
            noise = rng.integers(0, 1 << 16, (400, 200), np.uint32)
            bits = (case.merged(PATH).view(np.uint32) + noise) & np.uint32(0xFFFF0000)
            weight, case.dtype = bits.view(np.float32).astype("bfloat16"), "bfloat16"
        else:
            weight = case.merged(PATH, lambda v, m, w: step(gain(v, m)) * v)
        verdict = case.audit(case.whole() | {WEIGHT: weight})[WEIGHT]
        assert verdict.right or verdict.verdict == "kept in part", verdict


@pytest.mark.parametrize("by_rows", [False, True])
def test_independent_errors_of_any_size_make_no_part(by_rows):
    """Those of a row are a multiple of one number where a unit is a row."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        size = 10.0 ** rng.uniform(-3, 1, (80, 90))
        error = size * rng.standard_normal((80, 1) if by_rows else (80, 90))
        for other in (0.5, 1.0, 2.0):
            difference = other * size * rng.choice([-1, 1], (80, 1))
            found = _audit_parts.Parts(error, error, by_rows=by_rows)
            assert found.not_right("", error + difference) is None


def test_a_part_must_be_better_than_both_right_formulas():
    error, exact = np.zeros((40, 30)), np.zeros((40, 30))
    error[8:12] = 0.2
    part = _audit_parts.Parts(error, error, by_rows=False).not_right("it", exact)
    assert part[:4] == ("it", 0, 8, 12)
    assert part.fits
    for both in ((error, exact), (exact, error)):
        assert _audit_parts.Parts(*both, by_rows=False).not_right("it", exact) is None


def test_numbers_that_no_formula_explains_make_no_part():
    error = np.zeros((200, 30))
    error[:, 4] = 50
    other = error.copy()
    other[:, 4] = 49
    assert _audit_parts.Parts(error, error, by_rows=False).not_right("", other) is None
    other[:, 4] = 0
    assert _audit_parts.Parts(error, error, by_rows=False).not_right("", other) is not None


def test_differences_far_below_a_step_make_no_part():
    error = np.zeros((256, 30))
    error[128:] = 1e-3
    error[5] = 1  # a large sum, of one unit
    other = np.zeros_like(error)
    assert _audit_parts.Parts(error, error, by_rows=True).not_right("", other) is None
    error[128:] = 0.1
    assert _audit_parts.Parts(error, error, by_rows=True).not_right("", other) is not None


# Small updates in 16 bits


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("in_steps", [False, True])
def test_a_fault_that_rounding_hides_in_each_number_is_found_in_their_sum(
    tmp_path, dtype, in_steps
):
    """Every number is within the bound of a right merge."""
    case = Case(tmp_path, {"linear": (LayerKind(), (120, 200))}, dtype, 3e-4)

    def step(x):
        return cast(cast(x, dtype), float) if in_steps else x

    lora = case.merged(PATH, FAULTS["plain LoRA"], step=step)
    difference = np.abs(cast(lora, float) - cast(case.merged(PATH), float))
    limit = 2 * ml_dtypes.finfo(lora.dtype).eps * np.abs(cast(case.merged(PATH), float))
    assert (difference <= limit + 1e-4).all()
    assert case.fault(WEIGHT, lora) == "plain LoRA"
    assert case.fault(WEIGHT, case.merged(PATH, weight=case.merged(PATH))) == "merged twice"
    assert case.fault(WEIGHT, case.base[WEIGHT]) == "unchanged"
    rng = np.random.default_rng(1)
    other = case.adapter(rng, cast(case.base[WEIGHT], float), 3e-4)
    assert case.fault(WEIGHT, case.merged(PATH, adapter=other)) == "another adapter"


def test_an_update_that_rounding_lost_is_kept_in_part(tmp_path):
    case = small(tmp_path, "bfloat16", 3e-4)
    verdict = case.audit(case.whole())[WEIGHT]
    assert (verdict.verdict, verdict.right) == ("kept in part", False)
    w, right = cast(case.base[WEIGHT], float), cast(case.merged(PATH), float)
    case.dtype = "float64"
    update = case.merged(PATH) - w
    assert verdict.kept == pytest.approx(np.vdot(right - w, update) / np.vdot(update, update))
    assert verdict.detail == f"rounding left {verdict.kept:.2g} of the update"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_fault_below_the_rounding_errors_of_each_step_is_named(tmp_path, dtype):
    case = Case(tmp_path, {"linear": (LayerKind(), (96, 80))}, dtype, 3e-3)

    def step(x):
        return cast(cast(x, dtype), float)

    def formula(v, m, w):
        return step(m / step(np.linalg.norm(w, axis=1))[:, None]) * v

    assert case.fault(WEIGHT, case.merged(PATH, formula, step=step)) == "base norm"


def test_a_fault_below_the_noise_of_stochastic_rounding_is_found(tmp_path):
    """No number shows it, and the sum of squares is near that of the right merge."""
    case = Case(tmp_path, {"linear": (LayerKind(), (400, 200))}, "bfloat16", 2e-3)
    noise = np.random.default_rng(0).integers(0, 1 << 16, (400, 200), np.uint32)

    def stochastic(formula):
        case.dtype = "float32"
        bits = (case.merged(PATH, formula).view(np.uint32) + noise) & np.uint32(0xFFFF0000)
        case.dtype = "bfloat16"
        return bits.view(np.float32).astype("bfloat16")

    right = stochastic(lambda v, m, w: gain(v, m) * v)
    assert case.audit(case.whole() | {WEIGHT: right})[WEIGHT].verdict == "rounded"
    assert case.fault(WEIGHT, stochastic(FAULTS["plain LoRA"])) != "kept in part"


def test_a_few_last_digits_tell_no_formula_from_another():
    def guess(*costs):
        return _formulas.Guess("", np.array(costs), fits=True)

    is_better = _formulas._is_better
    assert not is_better(guess(0.0, 0.0, 0.0), guess(0.1, 0.0, 0.1))
    assert is_better(guess(0.0, 0.0, 0.0), guess(0.1, 0.1, 0.1))
    assert not is_better(guess(2.0, 1.0, 3.0), guess(3.0, 3.0, 2.0))
    assert is_better(guess(*[2.0] * 50), guess(*[2.1, 2.3] * 25))
    assert is_better(guess(1.0, 1.0), guess(np.inf, 1.0))


# The other tensors


def test_a_bias_that_was_scaled_is_named(case):
    for path, layer in case.layers.items():
        if (bias := f"{path}.bias") in case.base:
            w = layer.kind.matrix(cast(case.base[f"{path}.weight"], float))
            a, b, m = (cast(leaf, float) for leaf in layer.adapter)
            scale = gain(w + S * (b @ a), m[:, None])[:, 0]
            scaled = cast(scale * cast(case.base[bias], float), case.dtype)
            assert case.fault(bias, scaled) == "bias scaled"
            assert case.fault(bias, scaled + scaled) == "changed"


def test_an_untouched_tensor_that_changed_is_named(tmp_path):
    case = small(tmp_path)
    changed = case.base[NORM].copy()
    changed[-1] = 5
    verdict = case.audit(case.whole() | {NORM: changed})[NORM]
    by = 5 - case.base[NORM][-1]
    assert verdict[:3] == ("changed", False, f"1 number differs, by up to {by:.3g}")
    assert case.fault("steps", np.arange(1, 4)) == "changed"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_number_that_overflows_in_a_copy_is_named(tmp_path, dtype):
    case = small(tmp_path)
    case.base[NORM][3] = 3.4e38
    case.write("base", case.base)
    with np.errstate(over="ignore"):
        narrow = cast(case.base[NORM], dtype)
    verdict = case.audit(case.whole() | {NORM: narrow})[NORM]
    assert verdict[:3] == ("NaN or infinity", False, "1 number, finite in BASE")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("bits", [0x7FC00001, 0xFFC00000, 0x7F800001])
def test_nan_and_infinity_that_the_base_has_are_right(tmp_path, bits):
    """Tools write other bits for NaN."""
    case = small(tmp_path)
    case.base[NORM][3] = np.uint32(bits).view(np.float32)
    case.base[NORM][4] = -np.inf
    case.write("base", case.base)
    assert case.audit(case.whole())[NORM].verdict == "equal"
    for dtype in ("float16", "bfloat16", "float64"):
        with np.errstate(invalid="ignore"):
            other = cast(case.base[NORM], dtype)
        for value in (np.nan, -np.nan):
            other[3] = value
            assert case.audit(case.whole() | {NORM: other})[NORM].verdict == "converted"
        changed = other.copy()
        changed[4] = np.inf
        verdict = case.audit(case.whole() | {NORM: changed})[NORM]
        assert verdict.verdict == "changed"
        changed[5] = 7
        detail = case.audit(case.whole() | {NORM: changed})[NORM].detail
        assert detail.startswith("2 numbers differ, by up to inf")
        changed[5] = np.nan
        verdict = case.audit(case.whole() | {NORM: changed})[NORM]
        assert verdict[:3] == ("NaN or infinity", False, "1 number, finite in BASE")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nan_in_a_tensor_of_the_adapters_own_is_named_unless_the_base_has_it(tmp_path, dtype):
    case = small(tmp_path)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    trained = np.full(11, 2, np.float32)
    trained[4] = np.nan
    save_file(load_file(file) | {"base_model.model.model.norm.weight": trained}, file)
    verdict = case.audit(case.whole() | {NORM: cast(trained, dtype)})[NORM]
    assert verdict[:3] == ("NaN or infinity", False, "1 number, finite in BASE")
    case.base[NORM][4] = np.inf
    case.write("base", case.base)
    assert case.audit(case.whole() | {NORM: cast(trained, dtype)})[NORM].right


@pytest.mark.filterwarnings("error")
def test_nan_in_a_bias_is_named(tmp_path):
    case = small(tmp_path)
    bias = case.base["model.linear.bias"].copy()
    bias[2:] = np.nan
    assert case.fault("model.linear.bias", bias) == "NaN or infinity"


def test_missing_and_extra_tensors_are_named(tmp_path):
    case = small(tmp_path)
    verdicts = case.audit(case.whole(model__norm__weight=None, more=np.ones(3)))
    wrong = {name: verdict.verdict for name, verdict in verdicts.items() if not verdict.right}
    assert wrong == {NORM: "missing", "more": "extra"}
    plan = plan_merge(tmp_path / "base", tmp_path / "adapter", Options())
    assert list(verdicts) == [*plan.tasks, "more"]


@pytest.mark.parametrize(
    ("name", "shape", "right"),
    [("embeddings.position_ids", (1, 9), True), ("rotary_emb.inv_freq", (4,), True),
     ("h.0.attn.masked_bias", (), True), ("h.0.attn.bias", (1, 1, 4, 4), True),
     ("h.0.attn.bias", (4,), False), ("position_ids_proj", (4,), False)],
)  # fmt: skip
def test_a_buffer_that_the_library_of_the_model_no_longer_writes_may_be_missing(
    tmp_path, name, shape, right
):
    """As transformers leaves out those that it computes from the configuration."""
    case = small(tmp_path)
    (file,) = (tmp_path / "base").glob("*.safetensors")
    buffer = np.ones(shape, np.float32)
    save_file(load_file(file) | {f"model.{name}": buffer}, file)
    verdicts = case.audit(case.whole())
    assert verdicts[f"model.{name}"][:2] == (("left out", True) if right else ("missing", False))
    assert sum(not verdict.right for verdict in verdicts.values()) == (not right)


def test_a_tensor_that_the_adapter_replaces_is_compared_with_the_adapters(tmp_path):
    case = small(tmp_path)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    trained = np.full(11, 2, np.float32)
    save_file(load_file(file) | {"base_model.model.model.norm.weight": trained}, file)
    assert case.audit(case.whole() | {NORM: trained})[NORM].verdict == "equal"
    assert case.audit(case.whole())[NORM].verdict == "not the adapter's"


TIED = {"tie_word_embeddings": True}


@pytest.mark.parametrize("update", [0.3, 3e-4])
def test_a_head_that_was_tied_keeps_the_old_embedding(tmp_path, update):
    """The adapter was trained on the embedding alone, so the head is W as it was."""
    case = Case(tmp_path, KINDS, "bfloat16", update, TIED)
    merged, old = case.merged("model.embed_tokens"), case.base["model.embed_tokens.weight"]
    right = case.audit(case.whole() | {"lm_head.weight": old})["lm_head.weight"]
    assert (right.verdict, right.right) == ("equal", True)
    wrong = case.audit(case.whole() | {"lm_head.weight": merged})["lm_head.weight"]
    assert wrong.verdict == "tied head changed"
    assert wrong.detail.startswith("changed: ")
    shared = case.audit(case.whole())["lm_head.weight"]
    assert shared.verdict == "tied head changed"
    case.config = {"tie_word_embeddings": False}
    case.write("base", case.base)
    extra = case.audit(case.whole() | {"lm_head.weight": old})["lm_head.weight"]
    assert extra.verdict == "extra"


def test_a_head_that_was_trained_as_one_with_the_embedding_is_that_one(tmp_path):
    case = Case(tmp_path, KINDS, "float32", 0.3, TIED)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    trained = cast(np.random.default_rng(1).standard_normal((60, 20)), "float32")
    names = ("model.embed_tokens.weight", "lm_head.weight")
    held = {name: x for name, x in load_file(file).items() if "embed_tokens" not in name}
    save_file(held | {f"base_model.model.{name}": trained for name in names}, file)
    whole = case.whole() | {"model.embed_tokens.weight": trained}
    assert all(verdict.right for verdict in case.audit(whole).values())
    assert case.audit(whole | {"lm_head.weight": trained})["lm_head.weight"].right
    old = case.base["model.embed_tokens.weight"]
    wrong = case.audit(whole | {"lm_head.weight": old})["lm_head.weight"]
    assert wrong.verdict == "tied head changed"


def test_a_head_that_the_merged_model_ties_may_be_missing(tmp_path):
    kinds = {"embed_tokens": KINDS["embed_tokens"]}
    case = Case(tmp_path, kinds, "float32", 3e-3, TIED)
    case.base["lm_head.weight"] = case.merged("model.embed_tokens")
    case.write("base", case.base)
    assert case.audit(case.whole(lm_head__weight=None))["lm_head.weight"].verdict == "equal"
    case.base["lm_head.weight"] = case.base["model.embed_tokens.weight"]
    case.write("base", case.base)
    assert case.audit(case.whole(lm_head__weight=None))["lm_head.weight"].verdict == "changed"
    case.config = {"tie_word_embeddings": False}
    assert case.audit(case.whole(lm_head__weight=None))["lm_head.weight"].verdict == "missing"


# Bad input, and the command


def test_nan_in_the_base_ends_the_audit_in_every_thread(tmp_path):
    case = small(tmp_path)
    case.base[WEIGHT][2, 2] = np.nan
    case.write("base", case.base)
    with pytest.raises(CheckpointError, match="contains NaN"):
        case.audit(case.base, jobs=2)


def test_an_error_in_one_thread_stops_the_others(tmp_path):
    case = small(tmp_path)
    more = {f"more.{number}": np.ones(1, np.float32) for number in range(60)}
    case.base |= more
    case.write("base", case.base)
    calls = []

    def on_bytes(count):
        calls.append(count)
        if len(calls) == 1:
            raise RuntimeError("the first call")
        time.sleep(0.02)

    with pytest.raises(RuntimeError, match="the first call"):
        case.audit(case.whole(), jobs=2, on_bytes=on_bytes)
    assert len(calls) < 30


def command(folder, *arguments):
    paths = [str(folder / name) for name in ("base", "adapter", "merged")]
    return main(["audit", *paths, *arguments])


def test_the_exit_status_is_0_only_where_every_tensor_is_right(tmp_path, capsys):
    case = small(tmp_path)
    case.write("merged", case.whole())
    assert command(tmp_path) == 0
    printed = capsys.readouterr().out
    assert printed.endswith(f"{tmp_path / 'merged'}: right\n")
    assert WEIGHT not in printed
    case.write("merged", case.whole() | {WEIGHT: case.base[WEIGHT]})
    assert command(tmp_path) == 1
    printed = capsys.readouterr().out
    assert f"{WEIGHT}: unchanged (the merge did nothing)\n" in printed
    assert printed.endswith(": 1 of 4 tensors is not right\n")
    (tmp_path / "merged" / "model-0.safetensors").write_bytes(b"x")
    assert command(tmp_path) == 2
    assert capsys.readouterr().err.startswith("doraxp audit: error: ")


def test_the_table_has_a_line_for_each_verdict_and_all_lists_every_tensor(tmp_path, capsys):
    case = Case(tmp_path, KINDS, "float32")
    plan = plan_merge(tmp_path / "base", tmp_path / "adapter", Options())
    run_merge(plan, tmp_path / "merged")
    assert command(tmp_path, "--all") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[2:4]] == [["equal", "5"], ["exact", "4"]]
    assert max(map(len, lines[:4])) <= 80
    for name in case.base:
        assert any(re.fullmatch(rf"{re.escape(name)}: (equal|exact)", line) for line in lines)


def test_the_error_without_the_extra_says_how_to_install_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert command(tmp_path) == 2
    assert install_hint("checkpoint") in capsys.readouterr().err


def test_numbers_whose_squares_overflow_are_not_right(tmp_path):
    case = Case(tmp_path, {"linear": KINDS["linear"]}, "float64")
    name = "model.linear.weight"
    huge = case.whole()[name] * 1e200
    assert not case.audit(case.whole() | {name: huge})[name].right


def test_a_bias_of_another_length_is_not_called_scaled(tmp_path):
    case = small(tmp_path)
    case.base["model.linear.bias"] = np.ones(3, np.float32)
    case.write("base", case.base)
    verdict = case.audit(case.whole() | {"model.linear.bias": 2 * np.ones(3, np.float32)})
    assert verdict["model.linear.bias"].verdict == "changed"


def test_only_the_first_tensors_of_a_wrong_verdict_are_listed(tmp_path, capsys):
    case = small(tmp_path)
    case.write("merged", case.whole() | {f"more.{i}": np.ones(2) for i in range(12)})
    assert command(tmp_path) == 1
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.endswith(": extra") for line in lines) == 10
    assert lines[-2] == "and 2 more extra: --all lists them"
    assert command(tmp_path, "--all") == 1
    assert capsys.readouterr().out.count(": extra\n") == 12


def test_the_json_file_has_every_verdict(tmp_path):
    case = small(tmp_path)
    case.write("merged", case.whole() | {WEIGHT: case.base[WEIGHT]})
    assert command(tmp_path, "--json", str(tmp_path / "audit.json")) == 1
    report = json.loads((tmp_path / "audit.json").read_text())
    assert report["right"] is False
    assert report["tensors"].keys() == case.base.keys()
    assert report["tensors"][WEIGHT]["verdict"] == "unchanged"
    assert report["tensors"][NORM]["right"] is True


# The wrong merges


@pytest.mark.parametrize("size", [(6, 6), (6, 9)])
def test_the_wrong_merges_of_some_rows_are_those_rows_of_the_deviating_formulas(size):
    rng = np.random.default_rng(3)
    w, rows, config = rng.standard_normal(size), np.array([1, 4]), Config(2, 3.0)
    adapter = Adapter(
        rng.standard_normal((2, size[1])), rng.standard_normal((size[0], 2)), rng.random(size[0])
    )
    empty = {"x": np.empty((0, size[1])), "dy": np.empty((0, size[0]))}

    def whole(formulas):
        arrays = {"weight": w, **adapter._asdict(), **empty}
        return np.asarray(formulas(config, arrays, lambda x: x.view(Plain)).merged)

    right = whole(DenseFormulas)
    v = w + 1.5 * adapter.lora_b @ adapter.lora_a
    norms = np.linalg.norm(v, axis=1), np.linalg.norm(v, axis=0)
    part = adapter._replace(lora_b=adapter.lora_b[rows], magnitude=adapter.magnitude[rows])
    np.testing.assert_allclose(right_merge(w[rows], part, config), right[rows], rtol=1e-14)
    found = dict(wrong_merges(w[rows], part, config))
    found |= dict(wrong_merges_across_rows(v[rows], rows, adapter.magnitude, *norms))
    for name, changes in FORWARD.items():
        try:
            wrong = whole(deviating(DenseFormulas, changes))
        except ValueError:  # the matrix must be square
            assert name not in found
            continue
        if name in found:
            np.testing.assert_allclose(found[name], wrong[rows], rtol=1e-12, err_msg=name)
        else:
            np.testing.assert_array_equal(wrong, right, err_msg=name)
    assert set(ACROSS_ROWS) <= found.keys() or size[0] != size[1]


@pytest.mark.parametrize("alpha", [None, -1.0])
def test_without_alpha_the_right_merge_has_the_scale_1(alpha):
    rng = np.random.default_rng(4)
    w = rng.standard_normal((6, 9))
    adapter = Adapter(rng.standard_normal((2, 9)), rng.standard_normal((6, 2)), rng.random(6))
    config, same = Config(2, alpha), Config(2, 2.0)
    np.testing.assert_array_equal(right_merge(w, adapter, config), right_merge(w, adapter, same))
    wrong, expected = (dict(wrong_merges(w, adapter, one)) for one in (config, same))
    for name, merged in expected.items():
        np.testing.assert_array_equal(wrong[name], merged, err_msg=name)


def test_steps_are_rounded_one_by_one():
    rng = np.random.default_rng(4)
    w, config = rng.standard_normal((6, 9)), Config(2, 3.0)
    adapter = Adapter(rng.standard_normal((2, 9)), rng.standard_normal((6, 2)), rng.random(6))
    step = rounds_to("bfloat16")
    a, b, m = map(step, adapter)
    v = step(step(w) + step(1.5 * step(b @ a)))
    norm = step(np.linalg.norm(v, axis=1))[:, None]
    expected = step(step(m[:, None] / norm) * v)
    dtypes = [np.dtype("bfloat16")] * 4
    np.testing.assert_array_equal(right_merge(w, adapter, config, dtypes), expected)


@pytest.mark.parametrize(
    ("weight", "rest"), [("float32", "float32"), ("bfloat16", "float32"), ("float16", "float16")]
)
def test_a_step_of_two_dtypes_has_the_wider_one(weight, rest):
    """float32 for bfloat16 and float16."""
    rng = np.random.default_rng(4)
    w, config = rng.standard_normal((6, 9)), Config(2, 3.0)
    adapter = Adapter(rng.standard_normal((2, 9)), rng.standard_normal((6, 2)), rng.random(6))
    half, step = rounds_to("float16"), rounds_to(rest)
    a, b, m = map(half, adapter)
    v = step(rounds_to(weight)(w) + half(1.5 * half(b @ a)))
    expected = step(step(m[:, None] / step(np.linalg.norm(v, axis=1))[:, None]) * v)
    dtypes = [np.dtype(name) for name in (weight, "float16", "float16", "float16")]
    np.testing.assert_array_equal(right_merge(w, adapter, config, dtypes), expected)


@pytest.mark.parametrize("dtype", ["float16", ml_dtypes.bfloat16, "float32"])
def test_every_deviation_of_a_merge_can_be_rounded_after_each_step(dtype):
    rng = np.random.default_rng(5)
    adapter = Adapter(
        rng.standard_normal((2, 6)), rng.standard_normal((6, 2)), rng.standard_normal(6)
    )
    w, config = rng.standard_normal((6, 6)), Config(2, 3.0)
    rounded = dict(wrong_merges(w, adapter, config, [np.dtype(dtype)] * 4))
    assert rounded.keys() == dict(wrong_merges(w, adapter, config)).keys()
