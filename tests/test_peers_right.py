"""Right implementations of the kit's parts, which other libraries make: it must find nothing."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from doraxp.testing import Conventions, check_implementation

CHOICES = [("exact", "input"), ("exact", "low_rank"), ("detached", "input")]


@pytest.mark.parametrize(("norm_gradient", "dropout"), CHOICES)
def test_autograd_of_convolutions_and_embeddings_is_right(torch, norm_gradient, dropout):
    from peers import formulas

    peer = formulas.parts(norm_gradient, dropout)
    report = check_implementation(peer, Conventions(norm_gradient=norm_gradient, dropout=dropout))
    assert report.findings == (), report
    assert report.checked > 100


def test_jax_grad_of_convolutions_is_right(jax):
    from peers import formulas_jax

    peer = SimpleNamespace(convolution=formulas_jax.Convolution())
    report = check_implementation(peer, Conventions(dtypes=("float32",)))
    assert report.findings == (), report


def test_sums_and_other_updates_in_numpy_are_right():
    def merged(weight, update, magnitude):
        v = weight + update
        if magnitude is None:
            return v
        norm = np.linalg.norm(v, axis=1)[:, None]
        gain = np.divide(magnitude[:, None], norm, out=np.zeros_like(norm), where=norm > 0)
        return gain * v

    def loha(weight, first_a, first_b, second_a, second_b, magnitude, scaling):
        s = weight.dtype.type(scaling)
        return merged(weight, s * ((first_b @ first_a) * (second_b @ second_a)), magnitude)

    def lokr(weight, left, right, right_a, right_b, magnitude, scaling):
        right = right_b @ right_a if right is None else right
        return merged(weight, weight.dtype.type(scaling) * np.kron(left, right), magnitude)

    def sums(weight, adapters, strengths, scalings):
        total = weight
        for one, t, s in zip(adapters, strengths, scalings, strict=True):
            update = weight.dtype.type(s) * (one["lora_b"] @ one["lora_a"])
            change = merged(weight, update, one["magnitude"]) - weight
            total = total + weight.dtype.type(t) * change
        return total

    functions = {"loha": loha, "lokr": lokr, "sums": sums}
    peer = SimpleNamespace(**{k: SimpleNamespace(merge=f) for k, f in functions.items()})
    report = check_implementation(peer)
    assert report.findings == (), report
