"""docs/plain_english.py finds every phrase of its list, and no good sentence."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "docs" / "plain_english.py"

BAD = (
    "Return what the file holds.",
    "Returns what the file holds.",
    "What the guard keeps out of d.",
    "The rows are scaled. What is left is V.",
    "what raises is reported",
    "Hold the weight to its shape.",
    "Hold a choice to True or False.",
    "Say which sums overflowed.",
    "Tells whether W can be read.",
    "Say how it differs.",
    "A number is held to its bound.",
    "Two trees are held to each other.",
    "The answer is no array.",
    "Brackets are no commands.",
    "a rank that is no\ninteger",
    "A number is none.",
    "`dtype` is none of float16 and float32.",
    "Names that are none are refused.",
    "V is never formed, but for the gradient of W.",
    "A layer of one's own.",
    "The part that which was asked.",
)  # fmt: skip
GOOD = (
    "Return the values that the file holds.",
    "Return whether W can be read.",
    "There is no bias.",
    "Rows where there is no bias, and there are none in W.",
    "The error is no larger than its bound, and no worse than before.",
    "It is no longer read. The sum is no\nless than 0.",
    "The answer is no.",
    "The default is None.",
    "Hold a reference to W.",
    "Hold the lock, and write the part to a file.",
    "Holds the adapters by name.",
    "Show what each kernel takes.",
    "What does that cost? Nothing.",
    "The name says which file is read.",
    "But for float16 the bound is wider, it is 2u.",
    "A process with its own folder.",
    "Exact, but forward is slower.",
)  # fmt: skip
PLACES = {
    "docstring": ('"""{}"""\n', 1),
    "docstring below an attribute": ('class C:\n    x: int = 0\n    """{}"""\n', 3),
    "comment": ("x = 1\n# {}\n", 2),
    "comment at a line's end": ("x = 1  # {}\n", 1),
    "error message": ('def f(x):\n    raise ValueError(f"{}" + x)\n', 2),
    "message in a variable": (
        'def f(x):\n    message = """{}"""\n    raise ValueError(message)\n',
        2,
    ),
}


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("plain_english", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def lines(script, tmp_path, monkeypatch, capsys):
    """The function from a source to the lines that the script prints, and its exit status."""
    monkeypatch.chdir(tmp_path)

    def run(source, name="source.py"):
        Path(name).write_text(source, "utf-8")
        status = script.main([name])
        return capsys.readouterr().out.splitlines(), status

    return run


def inside(place, sentence):
    text, line = PLACES[place]
    if "comment" in place:
        sentence = sentence.replace("\n", "\n# " if place == "comment" else " ")
    elif place == "error message":
        sentence = sentence.replace("\n", " ")
    return text.format(sentence), line


@pytest.mark.parametrize("place", PLACES)
def test_a_bad_phrase_is_printed_with_its_file_and_line(lines, place):
    for sentence in BAD:
        source, line = inside(place, sentence)
        printed, status = lines(source)
        assert (bool(printed), status) == (True, 1), sentence
        assert all(one.startswith(f"source.py:{line}: ") for one in printed), sentence


@pytest.mark.parametrize("place", PLACES)
def test_a_good_sentence_is_not_printed(lines, place):
    for sentence in GOOD:
        assert lines(inside(place, sentence)[0]) == ([], 0), sentence


def test_every_phrase_of_the_list_has_a_bad_sentence(script):
    sentences = [sentence.replace("\n", " ") for sentence in BAD]
    for phrase, _ in script.RULES:
        assert any(phrase.search(sentence) for sentence in sentences), phrase.pattern


def test_the_line_is_that_of_the_phrase_in_a_long_docstring(lines):
    source = (
        'x = 1\n\n\ndef f():\n    """Return 1.\n\n    A number is\n    no array here.\n    """\n'
    )
    assert lines(source)[0] == ["source.py:7: 'is no array': write 'is not a' or 'there is no'"]


def test_the_name_of_a_test_is_read_as_a_sentence(lines):
    assert lines("def test_what_raises_is_reported(): pass")[1] == 1
    assert lines("def test_a_rank_that_is_no_integer_is_refused(): pass")[1] == 1
    assert lines("def test_there_is_no_bias(): pass")[1] == 0


def test_code_and_other_strings_are_not_read(lines):
    assert lines("is_none = 'what is none of these'\nheld_to = [is_none]\n") == ([], 0)


@pytest.mark.parametrize(
    "name", ["kernels.cu", "host.hpp", "check.mjs", "check.c", "dora.h", "check.rs"]
)
def test_comments_with_slashes_are_read(lines, name):
    printed, _ = lines("int x;\n// A row is\n// no column.\nint y;  // What is y\n", name)
    assert [line.split(": ")[0] for line in printed] == [f"{name}:2", f"{name}:4"]
    assert lines('auto url = "https://what.example";\n// There is no bias.\n', name) == ([], 0)


def test_a_folder_is_read_whole(script, tmp_path, capsys):
    (tmp_path / "inner").mkdir()
    for name, mark in (("a.py", "#"), ("inner/b.cu", "//"), ("c.txt", "#")):
        (tmp_path / name).write_text(f"{mark} What it is\n")
    assert script.main([str(tmp_path)]) == 1
    assert capsys.readouterr().out.count("begin with the name of the thing") == 2
