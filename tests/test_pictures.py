"""The palette and the drawings of the docs: `doraxp._terminal` and docs/figures."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from doraxp._terminal import palette

ROOT = Path(__file__).parents[1]


def luminance(colour: str) -> float:
    """Return the relative luminance of the WCAG, 0..1."""
    channels = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(a * b for a, b in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: str, other: str) -> float:
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("theme", [palette.LIGHT, palette.DARK])
def test_every_colour_is_seen_on_both_pages(theme):
    assert contrast(theme.ink, theme.paper) >= 7
    for style in palette.METHODS.values():
        assert contrast(style.colour, theme.paper) >= 3, style
    for colour in palette.COLOURS:
        assert contrast(colour, theme.paper) >= 3, colour


def test_each_method_has_a_colour_of_its_own():
    colours = [style.colour for style in palette.METHODS.values()]
    assert len(set(colours)) == len(colours)


@pytest.mark.parametrize(
    ("contestant", "method"),
    [
        (("numpy", "bare products", "bare"), "bare"),
        (("torch", "exact", "exact"), "DoRA exact"),
        (("numpy", "norm reused", "exact"), "DoRA exact"),
        (("jax", "detached", "detached"), "DoRA detached"),
        (("PEFT", "DoRA", "detached"), "PEFT"),
        (("PEFT", "accelerated, detached", "detached"), "DoRA detached"),
        (("PEFT", "LoRA", "LoRA"), "LoRA"),
        (("numpy", "a new one", "other"), "another"),
    ],
)
def test_a_contestant_has_the_colour_of_its_method(contestant, method):
    assert palette.method_of(*contestant) == method


def test_the_drawing_of_a_row_is_that_of_its_script():
    path = ROOT / "docs" / "figures" / "dora.py"
    spec = importlib.util.spec_from_file_location("dora_figure", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    for name, theme in script.PICTURES.items():
        drawn = (script.IMAGES / name).read_text("utf-8")
        assert drawn == script.drawn(theme), "run python docs/figures/dora.py"


@pytest.mark.parametrize("dark", [False, True])
def test_a_picture_has_the_paper_of_its_page(tmp_path, dark):
    pytest.importorskip("matplotlib")
    from matplotlib.colors import to_rgb
    from matplotlib.image import imread

    from doraxp.demo import BaseRun, Results, Run, Settings, save_picture

    changes = {f"layer {n}": [(0.1, 0.2), (0.3, 0.4)] for n in (1, 2, 3)}
    run = Run(0.9, 0.9, 1e-6, 100, 0.1, [1.0] * 500, changes)
    methods = dict.fromkeys(("LoRA", "DoRA detached", "DoRA exact", "full fine-tuning"), [run] * 3)
    results = Results(Settings(), 100, 50, [BaseRun(0.9, 0.1, 0.1)] * 3, methods)
    save_picture(results, tmp_path / "p.png", dark=dark)
    theme = palette.DARK if dark else palette.LIGHT
    pixels = imread(tmp_path / "p.png")
    np.testing.assert_allclose(pixels[0, 700], (*to_rgb(theme.paper), 1), atol=1 / 255)
    assert pixels[0, 0, 3] == 0  # a round corner, on a page of any colour
