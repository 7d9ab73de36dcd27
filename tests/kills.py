"""Training runs that are killed while they save: a script for test_training.py.

    python tests/kills.py FOLDER [kills]

A parent, which has imported everything, forks the processes that it kills. It prints JSON:

    resumed    the steps at which a killed run was resumed
    equal      whether the last state is that of a run that nobody killed, bit for bit
    moments    file operations of one save; a process was killed before each
    complete   whether each of those kills left the old state or the new one
"""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np

import doraxp
from doraxp.checkpoint import load_training, save_training

STEPS = 200
EVENTS = ("open", "os.rename", "os.remove", "os.mkdir")


def make():
    """Return a model, an optimizer and a generator of batches."""
    rng = np.random.default_rng(0)
    layers = {name: doraxp.Linear(rng.standard_normal((6, 6)), np.zeros(6)) for name in "ab"}
    config = doraxp.Config(2, dropout="low_rank")
    model = doraxp.adapt_layers(layers, "all-linear", config, seed=0, dropout=0.1)
    schedule = doraxp.cosine_schedule(0.01, total_steps=STEPS, warmup_steps=5)
    return model, doraxp.AdamW(schedule, max_norm=1.0), rng


def train(folder, report=lambda: None, every=2):
    """Train to the last step, from the state in the folder if there is one; save now and then."""
    model, optimizer, rng = make()
    if (folder / "training.json").exists():
        training = load_training(folder)
        optimizer, rng = training.resume(model), training.generator
    while optimizer.steps < STEPS:
        x = rng.standard_normal((8, 6))
        y = model["b"](np.tanh(h := model["a"](x)))
        model["a"].backward((1 - np.tanh(h) ** 2) * model["b"].backward(y - x[:, ::-1]))
        model.step(optimizer)
        if optimizer.steps % every == 0:  # each save waits for the disk
            save_training(folder, model, optimizer, generator=rng, extra={"sum": float(np.sum(y))})
        report()


def bits(folder):
    """Return the arrays and the numbers of a state."""
    model, *_ = make()
    training = load_training(folder)
    optimizer = training.resume(model)
    arrays = [
        *model.parameters.values(),
        *optimizer.state.mu.values(),
        *optimizer.state.nu.values(),
    ]
    raw = b"".join(each.tobytes() for one in arrays for each in one.values())
    return raw, training.step, training.extra, training.generator.bit_generator.state


def forked(function):
    """Return the number of a process that runs the function and ends."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            function()
            status = 0
        finally:
            os._exit(status)
    return child


def kill_in_training(folder, kills):
    """Kill a run again and again at random moments, and return the steps it was resumed at."""
    rng, resumed = np.random.default_rng(1), []
    for _ in range(kills):
        read, write = os.pipe()
        child = forked(lambda end=write: train(folder, lambda: os.write(end, b".")))
        os.close(write)  # so that a read ends where the child has: a fast one reaches the last step
        for _ in range(rng.integers(1, max(2, 2 * STEPS // kills - 1))):
            if not os.read(read, 1):
                break
        time.sleep(rng.uniform(0, 0.004))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(read)
        resumed.append(load_training(folder).step if (folder / "training.json").exists() else 0)
    os.waitpid(forked(lambda: train(folder)), 0)
    return resumed


def save_and_die(folder, moment, step):
    """Save a state, and die before a file operation."""
    model, optimizer, rng = make()
    count = 0

    def die(event, _):
        nonlocal count
        if event in EVENTS:
            count += 1
            if count == moment:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(die)
    save_training(folder, model, optimizer, generator=rng, step=step)


def kill_at_each_moment(folder):
    """Kill a save before each of its file operations; return how many, and whether all was well."""
    model, optimizer, rng = make()
    save_training(folder, model, optimizer, generator=rng, step=0)
    moment, complete, last = 0, True, 0
    while True:
        moment += 1
        child = forked(functools.partial(save_and_die, folder, moment, last + 1))
        killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
        step = load_training(folder).step
        complete &= step in (last, last + 1)
        last = step
        if not killed:
            return moment - 1, complete and step == last


def main(folder, kills=20):
    """Print the results of both."""
    folder.mkdir(parents=True, exist_ok=True)
    train(folder / "whole", every=STEPS)
    resumed = kill_in_training(folder / "killed", int(kills))
    moments, complete = kill_at_each_moment(folder / "moments")
    equal = bits(folder / "whole") == bits(folder / "killed")
    files = sorted(path.name for path in (folder / "killed").iterdir())
    result = {"resumed": resumed, "equal": equal, "files": files}
    print(json.dumps(result | {"moments": moments, "complete": complete}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
