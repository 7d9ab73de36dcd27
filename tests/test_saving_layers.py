"""`save_adapters` takes the layers of a training loop, with arrays of any library."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

import doraxp
from doraxp import AdaptedLayer, Adapter, Config, DoRALayer, LayerKind, Linear, adapt_layers
from doraxp.checkpoint import UpdatedLayer, load_adapters, save_adapters


def trained(layer, draw):
    shapes = (leaf.shape for leaf in layer.adapter)
    layer.adapter = Adapter(*(draw(*shape, dtype="float32") for shape in shapes))
    return layer


def linear(draw, **options):
    base = Linear(draw(7, 6, dtype="float32"))
    return trained(DoRALayer(base, options.pop("config", Config(2, 2.0)), seed=0, **options), draw)


def loaded(path):
    return dict(load_adapters(path))


def assert_equal(backend, one, other):
    for name, leaf, expected in zip(Adapter._fields, one, other, strict=True):
        np.testing.assert_array_equal(leaf, backend.numpy(expected), err_msg=name)


def test_layers_models_and_pairs_are_saved_alike(backend, draw, tmp_path):
    layer = linear(draw)
    model = adapt_layers(
        {"fc": layer.base, "act": SimpleNamespace()}, ["fc"], Config(2, 2.0), seed=0
    )
    model.adapted["fc"].adapter = layer.adapter
    given = {
        "layer": {"fc": layer},
        "model": model,
        "pair": {"fc": (layer.adapter, layer.config)},
        "adapted": {"fc": AdaptedLayer(layer.adapter, layer.config, LayerKind(), (7, 6))},
    }
    for name, adapters in given.items():
        save_adapters(tmp_path / name, adapters)
        (found,) = loaded(tmp_path / name).values()
        assert (found.config, found.kind, found.shape) == (layer.config, LayerKind(), (7, 6))
        assert_equal(backend, found.adapter, layer.adapter)


def test_updates_of_any_library_are_saved(backend, draw, tmp_path):
    for name, m in (("dora", draw(7, dtype="float32")), ("lora", None)):
        factors = doraxp.LowRank(draw(2, 6, dtype="float32"), draw(7, 2, dtype="float32"))
        adapter = doraxp.UpdateAdapter(factors, m)
        layer = UpdatedLayer(adapter, Config(2), LayerKind(), (7, 6))
        save_adapters(tmp_path / name, {"fc": layer})
        assert list(loaded(tmp_path / name)) == ["fc"]


def test_a_stack_of_adapters_may_be_a_pair(backend, draw, tmp_path):
    layer = DoRALayer(
        SimpleNamespace(weight=draw(3, 7, 6, dtype="float32")), Config(2), seed=0,
        kind=LayerKind("experts"),
    )  # fmt: skip
    trained(layer, draw)
    for name, given in (("layer", layer), ("pair", (layer.adapter, layer.config))):
        save_adapters(tmp_path / name, {"fc": given})
        (found,) = loaded(tmp_path / name).values()
        assert found.kind == LayerKind("experts")
        assert_equal(backend, found.adapter, layer.adapter)


def test_a_layer_of_the_direction_form_is_saved_in_the_weight_form(backend, draw, tmp_path):
    layer = linear(draw, config=Config(2, 2.0, form="direction"))
    save_adapters(tmp_path / "a", {"fc": layer})
    (found,) = loaded(tmp_path / "a").values()
    adapter, config = doraxp.convert_form(layer.weight, layer.adapter, layer.config, "weight")
    assert found.config == config
    assert_equal(backend, found.adapter, adapter)


@pytest.mark.parametrize("form", ["weight", "direction"])
def test_a_convolution_is_saved_with_its_kernel(backend, draw, tmp_path, form):
    base = SimpleNamespace(weight=draw(4, 3, 3, 2, dtype="float32"))
    layer = DoRALayer(base, Config(2, form=form), seed=0, operator=doraxp.Convolution())
    trained(layer, draw)
    save_adapters(tmp_path / "a", {"conv": layer})
    (found,) = loaded(tmp_path / "a").values()
    assert (found.kind, found.shape) == (LayerKind("conv"), (4, 3, 3, 2))
    merged = doraxp.merge(
        backend.numpy(base.weight), found.adapter, found.config, kind=LayerKind("conv")
    )
    expected = backend.numpy(layer.merge_to_original_layer().weight)
    np.testing.assert_allclose(merged, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.once
def test_layers_that_no_adapter_holds_are_named_and_nothing_is_written(draw, tmp_path):
    with pytest.raises(ValueError, match=r"^fc: train_base must be False, because an adapter's"):
        save_adapters(tmp_path / "a", {"fc": linear(draw, train_base=True)})
    for given in (Linear(draw(3, 3)), (Config(2), Config(2)), linear(draw).adapter):
        message = "^fc: must be an AdaptedLayer, .* or a pair of Adapter and Config, got"
        with pytest.raises(TypeError, match=message):
            save_adapters(tmp_path / "a", {"fc": given})
    assert not (tmp_path / "a").exists()


class OnDevice(np.ndarray):
    """An array with CuPy's way to the host, and no other."""

    def get(self):
        return np.array(self.view(np.ndarray))

    def __array__(self, *_, **__):
        raise TypeError("Implicit conversion to a NumPy array is not allowed")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_arrays_of_a_device_are_fetched(tmp_path, dtype):
    rng = np.random.default_rng(0)
    host = [rng.standard_normal(shape).astype(dtype) for shape in ((2, 6), (7, 2), (7,))]
    adapter = Adapter(*(leaf.view(OnDevice) for leaf in host))
    save_adapters(tmp_path / "a", {"fc": (adapter, Config(2))})
    (found,) = loaded(tmp_path / "a").values()
    for leaf, expected in zip(found.adapter, host, strict=True):
        assert leaf.dtype == expected.dtype
        np.testing.assert_array_equal(leaf, expected)


def test_parameters_of_torch_are_saved(torch, tmp_path):
    layer = DoRALayer(torch.nn.Linear(6, 7), Config(2), seed=0)
    adapter = Adapter(*map(torch.nn.Parameter, layer.adapter))
    save_adapters(tmp_path / "a", {"fc": (adapter, layer.config)})
    (found,) = loaded(tmp_path / "a").values()
    np.testing.assert_array_equal(found.adapter.lora_a, adapter.lora_a.detach().numpy())


@pytest.mark.dtypes("float16", "bfloat16")
def test_half_precision_is_saved_as_it_is(backend, dtype, draw, tmp_path):
    adapter = Adapter(*(draw(*shape, dtype=dtype) for shape in ((2, 6), (7, 2), (7,))))
    save_adapters(tmp_path / "a", {"fc": (adapter, Config(2))})
    (found,) = loaded(tmp_path / "a").values()
    assert found.adapter.lora_a.dtype.name == dtype
    assert_equal(backend, found.adapter, adapter)
