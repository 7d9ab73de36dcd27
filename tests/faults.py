"""The faults that are planted in `naive.py`: the old code, the new code and the fault's name.

python tests/faults.py    writes the table of docs/testing.md
"""

from __future__ import annotations

import types
from pathlib import Path
from typing import Literal, NamedTuple

from doraxp.testing import Conventions, Report, check_implementation

HERE = Path(__file__).parent
SOURCE = (HERE / "naive.py").read_text("utf-8")
PAGE = HERE.parent / "docs" / "testing.md"
HEAD, TAIL = "| planted in NumPy code | caught | named |\n|---|---|---|\n", "\n<!-- faults -->"


class Fault(NamedTuple):
    old: str
    new: str
    name: str | None
    """The deviation that the report must name; None for a fault without a known name."""
    scaling: Literal["s", "alpha"] = "s"
    """The number that the code is given as `scaling`."""


FAULTS = (
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
    Fault("sum(axis=1))", "sum(axis=1)) + v.dtype.type(1e-6)", "1e-06 is added to the norm"),
    Fault("sum(axis=1))", "sum(axis=1) / v.shape[1])", "the norm is a root mean square"),
    Fault("delta = scaling * (lora_b @ lora_a)", "delta = lora_b @ lora_a", "s is left out"),
    Fault("delta = scaling * (", "delta = scaling**2 * (", "s is applied twice"),
    Fault("delta = scaling", "delta = scaling", "alpha where s belongs", "alpha"),
    Fault("delta = scaling", "delta = scaling / len(lora_a) ** 0.5", "s = alpha/√rank", "alpha"),
    Fault("v = weight + delta", "v = weight - delta", "the update is subtracted"),
    Fault(
        "v = weight + delta",
        "v = weight / np.sqrt((weight**2).sum(1))[:, None] + delta",
        "the direction form",
    ),
    Fault("lora_b @ lora_a", "lora_b[:, ::-1] @ lora_a", "B meets A in the reverse order of ranks"),
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
)


def planted(fault: Fault | None) -> types.ModuleType:
    """Return `naive` as a module, with a fault unless it is None."""
    source = SOURCE
    if fault is not None:
        assert fault.old in SOURCE, fault.old
        source = SOURCE.replace(fault.old, fault.new)
    module = types.ModuleType("naive")
    exec(compile(source, "naive.py", "exec"), vars(module))
    return module


def check(fault: Fault) -> Report:
    return check_implementation(
        planted(fault), Conventions(scaling=fault.scaling, dropout="input", dtypes=("float64",))
    )


def row(fault: Fault, report: Report) -> str:
    """Return the row of the table in docs/testing.md."""
    names = "; or ".join(dict.fromkeys(" and ".join(one.deviations) for one in report.diagnoses))
    given = ", where `scaling` is alpha" if fault.scaling == "alpha" else ""
    text = f"`{fault.old}` → `{fault.new}`{given} | {'no' if report.ok else 'yes'} | {names or '–'}"
    return f"| {text} |".replace("|m|", "\\|m\\|")


if __name__ == "__main__":
    before, _, rest = PAGE.read_text("utf-8").partition(HEAD)
    _, tail, after = rest.partition(TAIL)
    PAGE.write_text(
        before + HEAD + "\n".join(row(fault, check(fault)) for fault in FAULTS) + tail + after,
        "utf-8",
    )
