"""README.md is short, its links lead somewhere, and its examples work as they are printed.

docs/blocks.py runs the block of Python, and .ci/run the commands that install.
"""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path

import pytest

from doraxp.cli import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")

FIGURE = re.compile(r"(?<![\w.])\d+(?:\.\d+)?(?![\w.]*\d)")


def blocks(language: str) -> list[str]:
    """Return the blocks of code in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def test_it_has_at_most_120_lines():
    assert len(README.splitlines()) <= 120


def test_a_measured_figure_is_on_a_page_that_names_its_command():
    pages = [path.read_text("utf-8") for path in (ROOT / "docs").rglob("*.md")]
    rows = re.findall(r"^\|(.*)\| `python (benchmarks/\w+\.py)[^`]*` \|$", README, re.MULTILINE)
    assert len(rows) == 4
    for cells, script in rows:
        task, ratios = cells.strip("| ").split(" | ")
        figures = set(FIGURE.findall(ratios))
        if ", in " in task:
            figures |= set(FIGURE.findall(task.partition(", in ")[2]))
        assert figures, cells
        assert any(
            script in page and figures <= figures_of(page, inverse="accelerated" in task)
            for page in pages
        ), cells


def figures_of(page: str, inverse: bool) -> set[str]:
    """Return the figures of a page. Those of accelerated layers are doraxp's time ÷ PEFT's."""
    figures = FIGURE.findall(page)
    return {f"{1 / float(one):.1f}" for one in figures if float(one)} if inverse else set(figures)


def test_every_link_leads_to_a_file():
    paths = re.findall(r"\]\(((?:docs/|\w+\.md)[^)#]*)", README)
    assert len(paths) > 20
    assert [path for path in paths if not (ROOT / path).is_file()] == []


@pytest.mark.parametrize("words", ["doraxp demo", "&& nox"])
def test_the_first_line_with_the_words_is_a_command_for_ci(words):
    """.ci/run looks for this line, and runs it."""
    line = next(line for line in README.splitlines() if words in line)
    assert line.startswith("python -m pip install ")


def test_the_merge_of_files_works(tmp_path, monkeypatch, capsys):
    (commands,) = (block for block in blocks("sh") if "doraxp merge" in block)
    monkeypatch.chdir(tmp_path)
    install, make, merge = map(shlex.split, commands.splitlines())
    assert install[:4] == ["python", "-m", "pip", "install"]
    source = (ROOT / make[1]).read_text("utf-8")
    monkeypatch.setattr("sys.argv", make[1:])
    with pytest.raises(SystemExit, match=r"^0$"):
        exec(compile(source, make[1], "exec"), {"__name__": "__main__"})
    assert main(merge[1:]) == 0
    assert capsys.readouterr().out.endswith("small/merged: complete, and verified\n")


def test_the_example_with_peft_works(peft, torch, capsys):
    (example,) = (block for block in blocks("text") if "accelerate" in block)
    exec(example, {})
    assert capsys.readouterr().out == "('base_model.model.0', 'base_model.model.2')\n"


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("![a picture](docs/images/a.png)\n\nText", "Text"),
        ("see [a page](docs/a.md#part)", "see a page (`docs/a.md#part`)"),
        ("see [a paper](https://a.b/c)", "see [a paper](https://a.b/c)"),
        ("pip install '.[demo]' && doraxp demo", "pip install 'doraxp[demo]' && doraxp demo"),
        ("`python -m pip install .` alone", "`python -m pip install doraxp` alone"),
        ("`pip install '.[torch]' peft`", "`pip install 'doraxp[torch]' peft`"),
        ("needs `'.[torch,bench]' peft`", "needs `'doraxp[torch,bench]' peft`"),
        ("see [CITATION.cff](CITATION.cff)", "see `CITATION.cff`"),
        ('y = model["up"](x)', 'y = model["up"](x)'),
        ("In a clone of this repository, with Python", "With Python"),
    ],
)  # fmt: skip
def test_an_index_of_packages_shows_what_works_there(text, seen):
    assert on_an_index(text) == seen


def test_all_of_it_works_on_an_index_of_packages():
    """A link there is absolute, and doraxp is installed by its name."""
    text = on_an_index(README)
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    assert re.findall(r"\[[^]]+\]\((?!https:)[^)]*\)", prose) == []
    assert re.findall(r"\S*\.\[\w.*", text) == []
    assert "install 'doraxp[demo]'" in text


def on_an_index(text: str) -> str:
    """README's text as the hook in pyproject.toml writes it into the wheel."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    hook = project["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]
    for rule in hook["substitutions"]:
        text = re.sub(rule["pattern"], rule["replacement"], text)
    return text
