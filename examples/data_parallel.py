"""Train a DoRA layer on many processes: split by tokens, by the weight's rows, by its columns.

    mpiexec -n 2 python examples/data_parallel.py

It needs NumPy and mpi4py. Every process draws the same numbers, keeps its part and trains. Then its
part of W' is compared with that of a layer which was trained whole.
"""

from __future__ import annotations

import numpy as np
from mpi4py import MPI

import doraxp
from doraxp import Adapter

TOKENS, INNER, OUT, STEPS = 64, 48, 32, 20
CONFIG = doraxp.Config(rank=4, alpha=8)

world = MPI.COMM_WORLD


class AllReduce:
    """Sums arrays over the processes, and counts the sums."""

    count = 0

    def __call__(self, part):
        self.count += 1
        total = np.empty_like(part)
        world.Allreduce(part, total)
        return total


def train(x, target, weight, adapter, *, reduce=None, share=lambda gradients: gradients):
    """Return W' after STEPS steps of AdamW.

    `reduce` sums parts of a product over a split input axis; `share` sums the gradients.
    """
    state, previous = doraxp.adamw_init(adapter), None
    for _ in range(STEPS):
        y, cache = doraxp.forward(x, weight, adapter, CONFIG, previous=previous, reduce=reduce)
        previous = cache.prepared
        dy = 2 * (y - target) / (TOKENS * OUT)
        gradients = share(doraxp.backward(dy, cache).adapter)
        adapter, state = doraxp.adamw_step(adapter, gradients, state, learning_rate=0.03)
    prepared = doraxp.prepare(weight, adapter, CONFIG, previous=previous)  # with the same reduce
    return doraxp.merge(weight, adapter, CONFIG, prepared=prepared)


def mine(length):
    """Return the part of an axis that belongs to this process."""
    ends = np.linspace(0, length, world.size + 1).astype(int)
    return slice(ends[world.rank], ends[world.rank + 1])


def report(name, merged, want, sums):
    """Print the largest difference on any process, and the number of sums for each step."""
    difference = world.allreduce(np.max(np.abs(merged - want)) / np.max(np.abs(want)), op=MPI.MAX)
    if world.rank == 0:
        print(f"{name}: {difference:.0e} off, sums a step: {sums.count // STEPS}")


def main():
    """Train the layer whole, and split in three ways."""
    rng = np.random.default_rng(0)
    x, weight = rng.standard_normal((TOKENS, INNER)), rng.standard_normal((OUT, INNER))
    target = x @ (weight + 0.3 * rng.standard_normal((OUT, INNER))).T
    adapter = doraxp.init(weight, CONFIG, seed=0)
    a, b, m = adapter
    want = train(x, target, weight, adapter)
    tokens, rows, columns = mine(TOKENS), mine(OUT), mine(INNER)
    if world.rank == 0:
        print(f"processes: {world.size}")

    sums = AllReduce()

    def share_all(gradients):
        """Sum the gradients of all parameters as one array."""
        flat = sums(np.concatenate([leaf.ravel() for leaf in gradients]))
        parts = np.split(flat, [a.size, a.size + b.size])
        return Adapter(*(part.reshape(of.shape) for part, of in zip(parts, adapter, strict=True)))

    merged = train(x[tokens], target[tokens], weight, adapter, share=share_all)
    report("data-parallel", merged, want, sums)

    sums = AllReduce()

    def share_a(gradients):
        """Sum the gradient of A, the only parameter that every process has whole."""
        return gradients._replace(lora_a=sums(gradients.lora_a))

    part = Adapter(a, b[rows], m[rows])
    merged = train(x, target[:, rows], weight[rows], part, share=share_a)
    report("column-parallel", merged, want[rows], sums)

    sums = AllReduce()
    part = Adapter(a[:, columns].copy(), b, m)  # m is the norm of whole rows
    merged = train(x[:, columns], target, weight[:, columns], part, reduce=sums)
    report("row-parallel", merged, want[:, columns], sums)


if __name__ == "__main__":
    main()
