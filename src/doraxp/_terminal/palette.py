"""One colour for one method in every picture: of the demo, the benchmark and the docs.

Each colour has a contrast of 3 and more both on white and on the dark page. Colour-blind readers
can tell them apart; dashes repeat the difference for prints without colours.
"""

from __future__ import annotations

from typing import NamedTuple

BLUE, SKY, VERMILION, GREEN = "#0072B2", "#4499D4", "#D55E00", "#009E73"
PURPLE, OCHRE, GREY = "#C06AA0", "#B07D00", "#808080"
COLOURS = (BLUE, VERMILION, GREEN, PURPLE, OCHRE, SKY, GREY)
"""For things that are not methods, as the kinds of modules."""


class Style(NamedTuple):
    """How a method is drawn."""

    colour: str
    dashes: str = "-"


METHODS = {
    "DoRA exact": Style(BLUE),
    "DoRA detached": Style(SKY, "--"),
    "LoRA": Style(VERMILION),
    "full fine-tuning": Style(PURPLE, ":"),
    "PEFT": Style(GREEN),
    "bare": Style(GREY),
    "another": Style(OCHRE),
}


class Theme(NamedTuple):
    """The colours of a page."""

    paper: str
    ink: str


LIGHT, DARK = Theme("#ffffff", "#24292f"), Theme("#131416", "#cfd0d0")


def method_of(library: str, name: str, kind: str) -> str:
    """Return the key in `METHODS` of a contestant of `doraxp bench`.

    `kind` is that of its answer. A layer of PEFT that doraxp accelerates is doraxp's DoRA.
    """
    if kind == "bare":
        return "bare"
    if "LoRA" in name:
        return "LoRA"
    if library == "PEFT" and not name.startswith("accelerated"):
        return "PEFT"
    return f"DoRA {kind}" if kind in ("exact", "detached") else "another"
