"""Turn formulas in Unicode, as `help()` shows them in a docstring, into LaTeX.

A block of lines becomes one aligned environment. A line has these columns:

    label:    left  =  right        a second formula, a shape, or words

Two spaces or more separate columns, except before a relation, + or −. The label ends with a colon,
or is a first column without a relation. Two letters or more make a word, which stays upright. One
letter is a variable, and a space between variables means a product.
"""

from __future__ import annotations

import re
import unicodedata

GREEK = (
    "alpha beta gamma delta varepsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho "
    "varsigma sigma tau upsilon phi chi psi omega"
)
RELATIONS = {"=": "=", "←": r"\leftarrow", "≤": r"\le", "->": r"\to"}
SIGNS = {chr(ord("α") + place): rf"\{name} " for place, name in enumerate(GREEK.split())}
SIGNS |= {sign: f"{name} " for sign, name in RELATIONS.items()}
SIGNS |= {sign: sign for sign in "+-/()[],;.<>!"}
SIGNS |= {"Σ": r"\sum ", "Δ": r"\Delta ", "⊙": r"\odot ", "⊗": r"\otimes ", "·": r"\cdot "}
SIGNS |= {"−": "-", "≥": r"\ge ", "≠": r"\ne ", "∞": r"\infty ", "…": r"\ldots ", "*": "{*}"}
SIGNS |= {"⟨": r"\langle ", "⟩": r"\rangle ", ":": r"{:}\ ", "%": r"\text{ % }"}
SIGNS |= {"//": r"\text{ // }"}
BARS = {"‖": "Vert", "|": "vert"}
ACCENTS = {"\u0302": "hat", "\u0303": "tilde", "\u0307": "dot", "~": "tilde"}
DIGITS = "0123456789"
RAISED = {"ᵀ": r"\top", "ᵗ": "t"} | dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹", DIGITS, strict=True))
LOWERED = {"ᵢ": "i", "ⱼ": "j", "ᵣ": "r"} | dict(zip("₀₁₂₃₄₅₆₇₈₉", DIGITS, strict=True))

RELATION = re.compile(r"(?<=\S) *([=←≤]|->) +")
SHAPE = re.compile(r"\([^()=]*,[^()=]*\)")
CHANGE = r"d(?:bias|[A-Za-z])(?![A-Za-z])"
WORD = rf"(?:(?!{CHANGE})[A-Za-z]{{2}}[A-Za-z0-9_.]*(?:-[a-z]+)*|`[^`]*`|\"[^\"]*\")"
BEFORE_WORDS = re.compile(r"[\w)\],‖|'~\u0300-\u036f] \Z")
AFTER_WORDS = re.compile(r" [\w(‖|]")
TOKEN = re.compile(
    rf"(?P<change>{CHANGE})"
    rf"|(?P<words>{WORD}(?:[,:;]? (?:{WORD}|a(?= [\w`]{{2}})))*)"
    rf"|(?P<marks>(?:_[A-Za-z]+|[{''.join([*RAISED, *LOWERED])}])+)"
    r"|(?P<number>\d+(?:\.\d+)?)|(?P<space> +)|(?P<two>->|//)|(?P<one>.)"
)


class FormulaError(ValueError):
    """A sign has no LaTeX here, or a bracket or a bar has no partner."""


def aligned(block: str) -> str:
    """Return the formulas of a block, one a line, as an aligned environment of LaTeX.

    Raises
    ------
    FormulaError
        The block is not one.
    """
    rows = [columns(line) for line in block.splitlines() if line.strip()]
    first = 0 if any(row[1] for row in rows) else 2  # without a label, its columns are left out
    lines = " \\\\\n".join(" & ".join(row[first:]) for row in rows)
    return f"\\begin{{aligned}}\n{lines}\n\\end{{aligned}}"


def columns(line: str) -> list[str]:
    """Return the columns of a line, of which `aligned` sets the odd ones to the right."""
    cells = re.split(r" {2,}", re.sub(r" {2,}(?=(?:[=←≤+−-]|->) )", " ", line.strip()))
    label = ""
    if len(cells) > 1 and (cells[0].endswith(":") or not RELATION.search(cells[0])):
        label = upright(cells.pop(0))
    left, *relation = RELATION.split(cells[0], maxsplit=1)
    if relation:
        sides = [formula(left), f"{RELATIONS[relation[0]]} {formula(relation[1])}"]
    else:
        sides = ["", formula(left)]
    return ["", label, *sides, *(part for cell in cells[1:] for part in ("", formula(cell)))]


def formula(text: str) -> str:
    """Return one formula as LaTeX. It may have words in it, or be a shape."""
    text = unicodedata.normalize("NFD", text)
    if SHAPE.fullmatch(text):
        return upright(text)
    result, place, opened = "", 0, dict[str, int]()
    while place < len(text):
        match = TOKEN.match(text, place)
        assert match is not None  # `one` matches each character
        kind, token, place = match.lastgroup, match[0], match.end()
        if kind == "words":
            before = (
                " " if re.search(r"[\w)\],‖|'~\u0300-\u036f] \Z", text[: match.start()]) else ""
            )
            after = " " if re.match(r" [\w(‖|]", text[place:]) else ""
            result += upright(f"{before}{token}{after}")
        elif kind == "change":
            result += r"\mathrm{d}" + (token[1] if len(token) == 2 else upright(token[1:]))
        elif kind == "marks":
            result += marks(token)
        elif token in BARS and token in opened:
            start = opened.pop(token)
            result = rf"{result[:start]}{{\l{BARS[token]} {result[start:]}\r{BARS[token]}}}"
        elif token in BARS:
            opened[token] = len(result)
        elif token in ACCENTS:
            result = re.sub(r"(\\[a-z]+ |\w)\Z", rf"\\{ACCENTS[token]}{{\1}}", result)
        elif token in "'′":
            result = re.sub(r"(\\[a-z]+ |\w)\Z", r"{\1'}", result)
        elif token == "√":
            end = root_end(text, place)
            result += rf"\sqrt{{{formula(text[place:end].removeprefix('(').removesuffix(')'))}}}"
            place = end
        elif kind == "number" or (token.isascii() and token.isalpha()):
            result += token
        elif kind != "space":
            if token not in SIGNS:
                raise FormulaError(f"{token!r} has no LaTeX in docs/unicode_math.py: {text!r}")
            result += SIGNS[token]
    if opened:
        raise FormulaError(f"a bar has no partner: {text!r}")
    return result.strip()


def marks(token: str) -> str:
    """Return a run of superscripts and subscripts as LaTeX."""
    raised = "".join(RAISED.get(mark, "") for mark in token)
    names = re.findall(r"_([A-Za-z]+)", token)
    lowered = "".join(LOWERED.get(mark, "") for mark in token)
    lowered += "".join(name if len(name) == 1 else upright(name) for name in names)
    return (f"_{{{lowered}}}" if lowered else "") + (f"^{{{raised}}}" if raised else "")


def root_end(text: str, place: int) -> int:
    """Return where the formula below a root ends: after one letter, or after a bracket."""
    end, depth = place, 0
    while end < len(text):
        depth += {"(": 1, ")": -1}.get(text[end], 0)
        end += 1
        if depth == 0 and text[end : end + 1] not in ACCENTS:
            return end
    raise FormulaError(f"a root has no end: {text!r}")


def upright(words: str) -> str:
    """Return words in upright letters."""
    return rf"\text{{{words.replace('`', '')}}}"
