"""Fine-tune a network of CuPy arrays on the GPU; on NumPy where CuPy is not installed.

    python examples/cupy_train.py

The same lines run on both: doraxp takes the library of the arrays that it is given, and its
kernels on CuPy's. Nothing in the loop waits for the GPU, except the line that prints the loss.
"""

from __future__ import annotations

import numpy as np

import doraxp

STEPS, WIDTH = 200, 256


def main(xp):
    """Train adapters of three frozen layers to follow a network that differs; print the loss."""
    rng = np.random.default_rng(0)

    def drawn(*shape, scale=1.0):
        return xp.asarray(scale * rng.standard_normal(shape, dtype=np.float32))

    weights = [drawn(WIDTH, WIDTH, scale=WIDTH**-0.5) for _ in range(3)]
    others = [w + drawn(WIDTH, 4, scale=0.5) @ drawn(4, WIDTH, scale=WIDTH**-0.5) for w in weights]
    layers = {f"fc{i}": doraxp.Linear(weight) for i, weight in enumerate(weights)}
    model = doraxp.adapt_layers(layers, "all-linear", doraxp.Config(rank=8), seed=0)
    optimizer = doraxp.AdamW(doraxp.cosine_schedule(3e-3, total_steps=STEPS), max_norm=1.0)
    print(model.summary())

    for step in range(STEPS):
        x = drawn(64, WIDTH)
        wanted = xp.tanh(xp.tanh(x @ others[0].T) @ others[1].T) @ others[2].T
        h = xp.tanh(model["fc0"](x))
        k = xp.tanh(model["fc1"](h))
        error = model["fc2"](k) - wanted
        dk = model["fc2"].backward(2 * error / error.size)
        dh = model["fc1"].backward((1 - k * k) * dk)
        model["fc0"].backward((1 - h * h) * dh)
        model.step(optimizer)
        if step in (0, STEPS - 1):
            print(f"loss at step {step}: {float(xp.mean(error * error)):.4f}")

    y, merged = model["fc2"](k), model.merge()["fc2"].forward(k)
    print(f"merged: {float(xp.max(xp.abs(y - merged))):.0e} off")


if __name__ == "__main__":
    try:
        import cupy
    except ImportError:
        main(np)
    else:
        main(cupy)
