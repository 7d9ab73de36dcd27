"""The faults that are planted in `naive.py` and `naive_parts.py`: old code, new code and names.

python tests/faults.py    writes docs/reference/faults.md
"""

from __future__ import annotations

import dataclasses
import functools
import types
from pathlib import Path
from typing import Any, Literal, NamedTuple

from doraxp.testing import Conventions, Report, check_implementation

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "reference" / "faults.md"
HEAD, TAIL = "| planted in NumPy code | caught | named |\n|---|---|---|\n", "\n<!-- faults -->"
EPS = (1.2e-7, 1e-6)
SIZES = (1e-12, 1e-8, 1e-7, 2.0**-23, 1.2e-7, 1e-6, 1e-5, 1e-4, 2.0**-10)
"""The numbers that the report knows as ones that somebody adds to a norm."""

USUAL = Conventions(dropout="input", dtypes=("float64",))


def declared(**choices: Any) -> Conventions:
    return dataclasses.replace(USUAL, **choices)


class Fault(NamedTuple):
    old: str
    new: str
    name: str | None
    """The deviation that the report must name; None for a fault without a known name."""
    meant: Conventions = USUAL
    """The choices that the code is declared to make."""
    also: tuple[str, str] | None = None
    """Old and new code of a second place."""
    eps: float = 0.0
    """A number that the code adds to the norm as well. The report must name it too."""
    source: Literal["naive", "naive_parts"] = "naive"

    @property
    def names(self) -> set[str]:
        """The names that the report must have."""
        of_eps = {f"{self.eps:g} is added to the norm"} if self.eps else set()
        return of_eps | ({self.name} if self.name else set())


def parts(*faults: tuple[Any, ...]) -> tuple[Fault, ...]:
    return tuple(
        Fault(old, new, name, also=also[0] if also else None, source="naive_parts")
        for old, new, name, *also in faults
    )


NORMS = {
    "np.sqrt((v * v).sum(axis=0))": "the norm of a column scales the row",
    "np.sqrt((weight * weight).sum(axis=1))": "the norm is that of the base weight",
    "np.sqrt((delta * delta).sum(axis=1))": "the norm is that of the update",
    "np.sqrt((v * v).sum() + 0 * v[:, 0])": "the norm is that of the whole matrix",
    "(v * v).sum(axis=1)": "the norm is not rooted",
    "np.sqrt((v * v).mean(axis=1))": "the norm is a root mean square",
}
LAYER = (
    Fault(
        "np.linalg.norm(weight, axis=1)",
        "np.linalg.norm(weight, axis=0)",
        "the norm runs over the input axis",
    ),
    Fault(
        "np.linalg.norm(weight, axis=1)", "np.ones_like(weight[:, 0])", "the magnitude is 1 at init"
    ),
    Fault(
        "np.linalg.norm(weight, axis=1)",
        "np.linalg.norm(weight, axis=1).astype('float16').astype(weight.dtype)",
        "the magnitude is rounded to float16 at init",
    ),
    Fault(
        "y = y + bias",
        "y = y + gain * bias",
        "the bias is scaled by m/n, so that forward is not merge",
    ),
    Fault("y = y + bias", "y = y - bias", "the bias is subtracted"),
    Fault("y = y + bias", "pass", "the bias is left out"),
    Fault("(v * v).sum(axis=1)", "(v * v).sum(axis=0)", "the norm of a column scales the row"),
    Fault(
        "(v * v).sum(axis=1)",
        "(weight * weight).sum(axis=1)",
        "the norm is that of the base weight",
    ),
    Fault("(v * v).sum(axis=1)", "(delta * delta).sum(axis=1)", "the norm is that of the update"),
    Fault(
        "(v * v).sum(axis=1)", "(v * v).sum() + 0 * v[:, 0]", "the norm is that of the whole matrix"
    ),
    Fault(
        "norm = np.sqrt((v * v).sum(axis=1))",
        "norm = (v * v).sum(axis=1)",
        "the norm is not rooted",
    ),
    *(
        Fault("sum(axis=1))", f"sum(axis=1)) + {size}", f"{size:g} is added to the norm")
        for size in SIZES
    ),
    Fault("sum(axis=1))", "sum(axis=1) / v.shape[1])", "the norm is a root mean square"),
    Fault("delta = scaling * (lora_b @ lora_a)", "delta = lora_b @ lora_a", "s is left out"),
    Fault("delta = scaling * (", "delta = scaling**2 * (", "s is applied twice"),
    Fault("delta = scaling", "delta = scaling", "alpha where s belongs", declared(scaling="alpha")),
    Fault(
        "delta = scaling",
        "delta = scaling / len(lora_a) ** 0.5",
        "s = alpha/√rank",
        declared(scaling="alpha"),
        ("da = scaling * lora_b", "scaling = scaling / len(lora_a) ** 0.5; da = scaling * lora_b"),
    ),
    Fault("v = weight + delta", "v = weight - delta", "the update is subtracted"),
    Fault(
        "v = weight + delta",
        "v = weight / np.sqrt((weight**2).sum(1))[:, None] + delta",
        "the direction form",
    ),
    Fault("lora_b @ lora_a", "lora_b[:, ::-1] @ lora_a", "B meets A in the reverse order of ranks"),
    *(
        Fault(
            "sum(axis=1))",
            f"sum(axis=1) + {size})",
            f"{size:g} is added under the root of the norm",
        )
        for size in SIZES
    ),
    Fault("gain = magnitude / norm", "gain = magnitude", "m is not divided by n"),
    Fault("gain = magnitude / norm", "gain = np.ones_like(norm)", "m/n is left out, as in LoRA"),
    Fault("gain = magnitude / norm", "gain = (magnitude / norm) ** 2", "m/n is applied twice"),
    Fault("gain = magnitude / norm", "gain = abs(magnitude) / norm", "|m| where m belongs"),
    Fault("q = -magnitude * e / norm**3", "q = 0 * e", "the norm is detached"),
    Fault("q = -magnitude", "q = magnitude", "the gradient through the norm has the wrong sign"),
    Fault(
        "q = -magnitude * e / norm**3",
        "q = -e / norm**2",
        "the gradient through the norm lacks m/n",
    ),
    Fault("e / norm**3", "e / norm**2", "the gradient through the norm lacks 1/n"),
    Fault("plain = dz.T @ xs", "plain = ds.T @ xs", "the gradients of A, B and W lack m/n"),
    Fault(
        "da = scaling * lora_b.T @ dv",
        "da = scaling * lora_b.T @ (ds.T @ xs + q[:, None] * v)",
        "dA lacks m/n",
    ),
    Fault("db = scaling * dv @", "db = scaling * (ds.T @ xs + q[:, None] * v) @", "dB lacks m/n"),
    Fault("da = scaling * lora_b", "da = lora_b", "dA lacks s"),
    Fault("db = scaling * dv", "db = dv", "dB lacks s"),
    Fault("da = scaling", "da = scaling**2", "dA has s twice"),
    Fault(
        "da = scaling * lora_b.T @ dv",
        "da = scaling * lora_b.T @ plain",
        "dA lacks the gradient through the norm",
    ),
    Fault("db = scaling * dv", "db = scaling * plain", "dB lacks the gradient through the norm"),
    Fault("db = scaling * dv", "db = -scaling * dv", "dB has the wrong sign"),
    Fault("dx = (dz @ v)", "dx = (ds @ v)", "dx lacks m/n"),
    Fault("dx = (dz @ v)", "dx = (dz @ weight)", "dx lacks the update"),
    Fault("dm = e / norm", "dm = e", "dm is not divided by n"),
    Fault("dm = e / norm", "dm = e * gain / norm", "dm has m/n once more"),
    Fault("dm = e / norm", "dm = magnitude * e / norm", "dm has m once more"),
    Fault('found["bias"] = ds.', 'found["bias"] = dz.', "dbias is scaled by m/n"),
    Fault("dropout_mask * x", "x", "the dropout mask is left out"),
    Fault("dropout_mask * x", "(dropout_mask > 0) * x", "the dropout mask lacks 1/(1 − p)"),
    Fault("(x - seen) @ weight.T", "0", "the dropout mask touches the base product too"),
    Fault(
        "(seen @ v.T) * gain + (x - seen) @ weight.T",
        "(seen @ v.T + (x - seen) @ weight.T) * gain",
        "the dropout mask touches the low-rank product alone",
    ),
    Fault("(dz @ v) * keep + (1 - keep) * (ds @ weight)", "dz @ v", "dx lacks the dropout mask"),
    Fault("* lora_b.T @ dv", "* lora_b.T @ (dv + dz.T @ (tokens - xs))", "dA has the whole x"),
    Fault("scaling * dv @", "scaling * (dv + dz.T @ (tokens - xs)) @", "dB has the whole x"),
    Fault("mean = mu / (1 - beta1**t)", "mean = mu", "mu has no bias correction"),
    Fault(
        'stepped, kept = {}, {"t": t}',
        'stepped, kept, t = {}, {"t": t}, t + 1',
        "the bias corrections are one step ahead",
    ),
    Fault(
        "* (mean / (np.sqrt(square) + eps)",
        "* (mean / np.sqrt(square + eps)",
        "eps is under the root",
    ),
    Fault("np.sqrt(square) + eps", "square + eps", "the root of nu is left out"),
    Fault(
        "g = grads[name]",
        "g = grads[name] + weight_decay * p * (name != 'magnitude')",
        "the decay is coupled and decoupled",
    ),
    Fault(
        '0.0 if name == "magnitude" else weight_decay', "weight_decay", "the magnitude decays too"
    ),
    Fault(" + decay * p)", ") - decay * p", "the decay is not multiplied by the learning rate"),
    Fault("mu, nu = state[name]", "mu, nu = 0 * p, 0 * p", "the moments are forgotten"),
    Fault("p - learning_rate", "p + learning_rate", "the step goes uphill"),
    Fault(
        "norm = np.sqrt((v * v).sum(axis=1))",
        "norm = np.sqrt(((weight + lora_b @ lora_a) ** 2).sum(axis=1))",
        "the norm lacks s",
    ),
    Fault("dm = e / norm", "dm = -e / norm", "dm has the wrong sign"),
    Fault("dm = e / norm", "dm = e / norm**2", "dm is divided by n twice"),
    Fault(
        "dm = e / norm",
        "dm = (ds * (z * gain + (0 if bias is None else bias))).sum(axis=0) / magnitude",
        "dm is made from y, bias and all",
    ),
    Fault("dm = e / norm", "dm = e / norm / max(1, len(ds))", "dm is a mean over the tokens"),
    Fault("dx.reshape(x.shape)", "-dx.reshape(x.shape)", "dx has the wrong sign"),
    Fault("dx = (dz @ v)", "dx = (dz @ (v - weight))", "dx lacks the base"),
    Fault("da = scaling", "da = -scaling", "dA has the wrong sign"),
    Fault("db = scaling * dv", "db = scaling**2 * dv", "dB has s twice"),
    Fault(
        "da = scaling * lora_b.T @ dv",
        "da = lora_b.T @ (scaling * plain + q[:, None] * v)",
        "dA's part through the norm lacks s",
    ),
    Fault(
        "db = scaling * dv @",
        "db = (scaling * plain + q[:, None] * v) @",
        "dB's part through the norm lacks s",
    ),
    Fault("dw = dv", "dw = plain", "dW lacks the gradient through the norm"),
    Fault(
        "ds.sum(axis=0)",
        "ds.mean(axis=0) if len(ds) else ds.sum(axis=0)",
        "dbias is a mean over the tokens",
    ),
    Fault("delta = scaling * (", "delta = 1 / scaling * (", "1/s where s belongs"),
    Fault("delta = scaling * (", "delta = 0 * (", "the update is left out"),
    Fault(
        "np.linalg.norm(weight, axis=1)",
        "((np.linalg.norm(weight, axis=1).astype('f4').view('u4') + 0x8000) & 0xFFFF0000)"
        ".view('f4').astype(weight.dtype)",
        "the magnitude is rounded to bfloat16 at init",
    ),
    Fault("mean = mu / (1 - beta1**t)", "mean = mu / (1 - beta1)", "mu has no bias correction"),
    Fault("square = nu / (1 - beta2**t)", "square = nu", "nu has no bias correction"),
    Fault(
        "/ (1 - beta1**t)\n        square = nu / (1 - beta2**t)",
        "\n        square = nu",
        "there are no bias corrections",
    ),
    Fault(
        'stepped, kept = {}, {"t": t}',
        'stepped, kept, t = {}, {"t": t}, 1',
        "the bias corrections are those of step 1",
    ),
    Fault(
        't = state["t"] + 1',
        't, beta1, beta2 = state["t"] + 1, beta2, beta1',
        "the betas are swapped",
    ),
    Fault("(1 - beta1) * g", "g", "mu lacks 1 − β₁"),
    Fault("(1 - beta2) * g * g", "g * g", "nu lacks 1 − β₂"),
    Fault(
        "np.sqrt(square) + eps",
        "(np.sqrt(nu) + eps) / np.sqrt(1 - beta2**t)",
        "eps is added before the bias correction",
    ),
    Fault("np.sqrt(square) + eps", "np.sqrt(square)", "eps is left out"),
    Fault(" + decay * p)", ")", "the decay is left out"),
    Fault(
        "v = weight + delta", "v = weight + delta", "the weight form", declared(form="direction")
    ),
    Fault(
        "v = weight + delta",
        "v = weight / np.sqrt((weight**2).sum(1))[:, None] + delta",
        "dW is that of the weight form",
        declared(form="direction"),
    ),
    Fault(
        "v = weight + delta",
        "v = weight / np.sqrt((weight**2).sum(1))[:, None] + delta",
        "dW lacks its projection",
        declared(form="direction"),
        ("dw = dv", "dw = dv / np.sqrt((weight**2).sum(1))[:, None]"),
    ),
    Fault(
        "(seen @ v.T) * gain + (x - seen) @ weight.T",
        "(seen @ v.T) * gain + (x - seen) @ weight.T",
        "the dropout mask touches the whole correction",
        declared(dropout="low_rank"),
    ),
    Fault("y = y + bias", "y = y + bias", "the bias is not scaled", declared(bias_scaled=True)),
    Fault("sum(axis=1))", "sum(axis=1))", "no number is added to the norm", declared(eps=1e-6)),
    Fault(
        "sum(axis=1))",
        "sum(axis=1)) + 1e-6",
        "the gradient through the norm has V/n where V/‖V‖ belongs",
        declared(eps=1e-6),
    ),
    Fault(
        "q = -magnitude",
        "q = -magnitude",
        "the norm is not detached",
        declared(norm_gradient="detached"),
    ),
    Fault(
        "da = scaling * lora_b.T @ dv\n    db = scaling",
        "da = -scaling * lora_b.T @ dv\n    db = -scaling",
        "dA and dB have the wrong sign",
    ),
    Fault(
        "return found",
        "return {k: g if k == 'x' else g / max(1, len(ds)) for k, g in found.items()}",
        "dA, dB, dm and dbias are means over the tokens",
    ),
    Fault(
        "return found",
        "return {k: g if k in ('x', 'bias') else g / max(1, len(ds)) for k, g in found.items()}",
        "dA, dB and dm are means over the tokens",
    ),
    Fault(
        'g = grads[name]\n        decay = 0.0 if name == "magnitude" else weight_decay',
        "g = grads[name] + weight_decay * p * (name != 'magnitude')\n        decay = 0",
        "the decay is coupled, as in Adam",
    ),
    *(
        Fault("np.sqrt((v * v).sum(axis=1))", new, name, eps=eps)
        for new, name in NORMS.items()
        for eps in (0.0, *EPS)
        if eps or name == "each column is divided by its own norm"
    ),
    *(
        Fault("np.sqrt((v * v).sum(axis=1))", "np.sqrt((v * v).sum(axis=1))", None, eps=eps)
        for eps in EPS
    ),
)

PARTS = parts(
    ("sum(axis=-1))\n", "sum(axis=-1)) + 1e-6\n", "1e-06 is added to the norm"),
    ("np.sqrt((v * v)", "np.sqrt((base * base)", "the norm is that of the base weight"),
    ("np.sqrt((v * v).sum(", "np.sqrt((v * v).mean(", "the norm is a root mean square"),
    ("np.sqrt((v * v).sum(axis=-1))", "(v * v).sum(axis=-1)", "the norm is not rooted"),
    ("base + scaling * update", "base + update", "s is left out"),
    (
        "base + scaling * update",
        "base + scaling**2 * update",
        "s is applied twice",
        ("scaling * (lora_a.T", "scaling**2 * (lora_a.T"),
    ),
    (
        "base + scaling * update",
        "base - scaling * update",
        "the update is subtracted",
        ("+ scaling * (lora_a.T", "- scaling * (lora_a.T"),
    ),
    (
        "np.sqrt((weight**2).reshape(len(weight), -1).sum(axis=1))",
        "np.ones(len(weight), weight.dtype)",
        "the magnitude is 1 at init",
    ),
    (
        "return ((m / norm)[..., None] * v).reshape(weight.shape)",
        "v = v.reshape(groups, len(weight) // groups, weight.shape[1], -1); "
        "places = np.sqrt((v**2).sum(axis=2, keepdims=True)); "
        "return (m[..., None, None] / places * v).reshape(weight.shape)",
        "each place of the kernel has a norm of its own",
    ),
    (
        "gain = m / norm\n",
        "gain = m / norm\n        shape = (*w.shape[:2], weight.shape[1], -1)\n"
        "        v, w = (one.reshape(shape)[..., ::-1].reshape(w.shape) for one in (v, w))\n",
        "the kernel is turned around",
    ),
    (
        "update = b @ a",
        "update = b @ a; update = update.reshape(groups, b.shape[1], -1, weight.shape[1])"
        ".swapaxes(2, 3).reshape(update.shape)",
        "B A has the axes of the kernel before that of the inputs",
    ),
    ("update = b @ a", "update = b @ a[:1]", "every group has the A of the first one"),
    (
        "y + bias.reshape(",
        "y + (bias * (m / norm).reshape(-1)).reshape(",
        "the bias is scaled by m/n, so that forward is not merge",
    ),
    (
        "y if bias is None else y + bias",
        "y if bias is None else y - bias",
        "the bias is subtracted",
    ),
    ("gain = m / norm", "gain = m", "m is not divided by n"),
    ("else mask * x", "else x", "the dropout mask is left out"),
    ("rest @ w.swapaxes(1, 2)", "0", "the dropout mask touches the base product too"),
    (
        "np.pad(x, [(0, 0), (0, 0)] + [(p, p) for p in padding])",
        "np.pad(x, [(0, 0), (0, 0)] + [(p, p) for p in padding], mode='edge')",
        None,
    ),
    ("q = -m * e", "q = 0 * e", "the norm is detached"),
    ("q = -m * e", "q = m * e", "the gradient through the norm has the wrong sign"),
    ("da = scaling * b.", "da = b.", "dA lacks s"),
    ("db = scaling * dv @ a.s", "db = dv @ a.s", "dB lacks s"),
    ('"magnitude": e / norm}', '"magnitude": e}', "dm is not divided by n"),
    ("(1 - dropout_mask) * back(ds @ w)", "0", "dx lacks what passes beside the mask"),
    (
        "dw = dv + ds.swapaxes(1, 2) @ rest",
        "dw = (m / norm)[..., None] * dmerged + ds.swapaxes(1, 2) @ rest",
        "dW lacks the gradient through the norm",
    ),
    ("ds.sum(axis=1)", "(ds * (m / norm)[:, None]).sum(axis=1)", "dbias is scaled by m/n"),
    ("np.sqrt((weight**2).sum(axis=0))", "np.ones_like(weight[0])", "the magnitude is 1 at init"),
    (
        "return ((magnitude / norm)[:, None] * v).T",
        "return (magnitude[:, None] / np.sqrt((v * v).sum(axis=0)) * v).T",
        "each column is divided by its own norm",
    ),
    (
        "weight[x] * scale + scaling * (lora_a.T[x] * scale)",
        "weight[x] + scaling * lora_a.T[x]",
        "the scale is left out",
    ),
    ("(lora_a.T[x] * scale)", "lora_a.T[x]", "the scale multiplies W alone"),
    ("weight[x] * scale", "weight[x]", "the scale multiplies the update alone"),
    ("return z * (", "return z * scale * (", "the scale is applied twice"),
    ("return z * (magnitude / norm)", "return z * magnitude", "m is not divided by n"),
    (
        "np.add.at(dmerged, x, scale * dy)",
        "dmerged[x] = scale * dy",
        "an id that comes again keeps its last gradient alone",
    ),
    ("np.add.at(dmerged, x, scale * dy)", "np.add.at(dmerged, x, dy)", "the scale is left out"),
    ("q = -magnitude * e", "q = 0 * e", "the norm is detached"),
    ("da = scaling * lora_b.T", "da = lora_b.T", "dA lacks s"),
    (
        "v if magnitude is None else (magnitude / norm)",
        "(np.sqrt((weight**2).sum(1)) / norm if magnitude is None else magnitude / norm)",
        "the rows keep the norms of W, as in DoRA with m = ‖W‖",
    ),
    ("(first_b @ first_a) * (", "(first_b @ first_a) + (", "the two products are added"),
    (
        "(first_b @ first_a) * (second_b @ second_a)",
        "first_b @ first_a",
        "the second product is left out",
    ),
    (
        "(first_b @ first_a) * (second_b @ second_a)",
        "second_b @ second_a",
        "the first product is left out",
    ),
    (
        "(first_b @ first_a) * (second_b @ second_a)",
        "(first_b @ second_a) * (second_b @ first_a)",
        "B of one product meets A of the other",
    ),
    (
        "np.kron(left, factor)",
        "np.kron(factor, left)",
        "the Kronecker product is the other way round",
    ),
    ("np.kron(left, factor)", "np.kron(left.T, factor)", "the left factor is transposed"),
    ("np.kron(left, factor)", "np.kron(left, factor.T)", "the right factor is transposed"),
    ("np.kron(left, factor)", "np.kron(np.ones_like(left), factor)", "the left factor is left out"),
    (
        "else right_b @ right_a",
        "else scaling * right_b @ right_a",
        "s multiplies a right factor of low rank once more",
    ),
    ("strength * (alone", "(alone", "the strengths are left out"),
    ("strength * (alone", "strength**2 * (alone", "the strengths are squared"),
    ("strength * (alone", "np.sqrt(strength) * (alone", "the strengths are rooted"),
    (
        "strength * (alone",
        "strength / sum(strengths) * (alone",
        "the strengths are divided by their sum",
    ),
    ("(alone - weight)", "alone", "W is added again with each adapter"),
    (
        'merged(weight, update, adapter["magnitude"], scaling)\n'
        "            total = total + strength *",
        'merged(weight, update, adapter["magnitude"], strength * scaling)\n'
        "            total = total +",
        "the strength multiplies s",
    ),
    (
        'merged(weight, update, adapter["magnitude"], scaling)\n'
        "            total = total + strength * (alone - weight)",
        'merged(total, update, adapter["magnitude"], scaling)\n'
        "            total = total + strength * (alone - total)",
        "each adapter is merged into the result of the one before",
    ),
    (
        "total = total + strength",
        "total = weight + strength",
        "the last adapter replaces the others",
    ),
    (
        "total = weight\n",
        "total = (1 - sum(strengths) * 0) * 0 * weight + sum(strengths) * weight\n",
        "W is left out of the sum",
    ),
    (
        "total + strength * (alone - weight)\n        return total",
        "total + strength * scaling * update\n"
        '        return merged(total, 0, adapters[0]["magnitude"], 1)',
        "the updates add up under one norm, with the first magnitude",
    ),
    (
        "total + strength * (alone - weight)\n        return total",
        "total + strength * scaling * update\n"
        "        pairs = zip(strengths, adapters)\n"
        '        m = sum(t * a["magnitude"] for t, a in pairs if a["magnitude"] is not None)\n'
        "        return merged(total, 0, m, 1)",
        "the updates and the magnitudes add up, under one norm",
    ),
    ("ratio * learning_rate if", "learning_rate if", "the ratio is left out"),
    ('if name == "lora_b" else', 'if name == "lora_a" else', "the ratio raises the rate of A"),
    ('if name == "lora_b" else', 'if name != "lora_a" else', "the ratio raises the rate of m too"),
    ('if name == "lora_b" else', "if name else", "the ratio raises every rate"),
    (
        'ratio * learning_rate if name == "lora_b"',
        'learning_rate / ratio if name == "lora_a"',
        "the ratio divides the rate of A",
    ),
    (
        "else weight_decay\n",
        'else weight_decay / (ratio if name == "lora_b" else 1)\n',
        "the decay of B lacks the ratio",
    ),
    (
        'decay = 0.0 if name == "magnitude" else weight_decay',
        "decay = weight_decay",
        "the magnitude decays too",
    ),
    ("np.sqrt(square) + eps)", "np.sqrt(square + eps))", "eps is under the root"),
    ("np.linalg.solve(b.T @ b + shift", "np.linalg.solve(a @ a.T + shift", None),
    (
        'np.linalg.solve(b.T @ b + shift, grads["lora_a"])',
        'grads["lora_a"]',
        "the gradient of A is not scaled",
    ),
    (
        'np.linalg.solve(a @ a.T + shift, grads["lora_b"].T).T',
        'grads["lora_b"]',
        "the gradient of B is not scaled",
    ),
    ("shift = damping", "shift = 0", "the damping is left out"),
    ("{**grads, **scaled}", "grads", "the gradients are not scaled"),
    (
        '= params["lora_a"], params["lora_b"]',
        '= params["lora_b"].T, params["lora_a"].T',
        "each gradient is divided by the Gram matrix of its own factor",
    ),
    ("np.linalg.solve(b.T @ b + shift, grads", "np.matmul(b.T @ b + shift, grads", None),
    ("np.linalg.solve(", "np.matmul(", "the gradients are multiplied by the Gram matrices"),
    (
        "(first_b @ first_a) * (second_b",
        "(first_b @ first_a) @ (second_b",
        "the two products are multiplied as matrices",
    ),
)

FAULTS = (*LAYER, *PARTS)


def planted(fault: Fault | None, source: str = "naive") -> types.ModuleType:
    """Return `naive` or `naive_parts` as a module, with a fault unless it is None."""
    name = source if fault is None else fault.source
    code = (HERE / f"{name}.py").read_text("utf-8")
    if fault is not None:
        assert fault.old in code, fault.old
        code = code.replace(fault.old, _new(fault))
        if fault.also is not None:
            assert fault.also[0] in code, fault.also
            code = code.replace(*fault.also)
    module = types.ModuleType(name)
    exec(compile(code, f"{name}.py", "exec"), vars(module))
    return module


def _new(fault: Fault) -> str:
    return f"{fault.new} + {fault.eps:g}" if fault.eps else fault.new


@functools.cache
def check(fault: Fault) -> Report:
    return check_implementation(planted(fault), fault.meant)


def is_named(fault: Fault) -> bool:
    """Return whether the report has the fault's names, and names for each wrong function."""
    report = check(fault)
    found = {name for one in report.diagnoses for name in one.deviations}
    return bool(fault.names) and fault.names <= found and not report.unexplained


def row(fault: Fault) -> str:
    """Return the row of the table in docs/reference/faults.md."""
    report = check(fault)
    names = "; or ".join(dict.fromkeys(" and ".join(one.deviations) for one in report.diagnoses))
    given = "".join(
        f", where `{name}` is {value}"
        for name, value in dataclasses.asdict(fault.meant).items()
        if value != getattr(USUAL, name)
    )
    pairs = [(fault.old, _new(fault)), *([fault.also] if fault.also else [])]
    texts = (" → ".join(f"`{_line(one)}`" for one in pair) for pair in pairs)
    text = f"{', '.join(texts)}{given} | {'no' if report.ok else 'yes'} | {names or '–'}"
    return f"| {text} |".replace("|m|", "\\|m\\|")


def _line(code: str) -> str:
    return " ⏎ ".join(line.strip() for line in code.strip().splitlines())


if __name__ == "__main__":
    before, _, rest = PAGE.read_text("utf-8").partition(HEAD)
    _, tail, after = rest.partition(TAIL)
    PAGE.write_text(before + HEAD + "\n".join(map(row, FAULTS)) + tail + after, "utf-8")
