"""Patterns for the ends of paths: equal to PEFT's use of `re`, and in linear time."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from doraxp._base import patterns
from doraxp._base.patterns import matches_any, values_by_path

PIECES = (
    "a", "b", "1", "_", "-", ".", r"\.", r"\d", r"\w", r"\s", r"\D", r"\W", r"\S", "[ab]", "[^a]",
    "[^a.]", "[a-z1]", r"[^\d.]", r"[\W_]", "^", "$", r"\A", r"\Z", r"\b", r"\B", "", "\n", "é",
)  # fmt: skip
REPEATS = ("*", "+", "?", "{2}", "{0}", "{1,2}", "{,2}", "{1,}", "*?", "+?", "??", "{0,2}?")


def grown(inner):
    groups = st.sampled_from(("({})", "(?:{})"))
    return (
        st.lists(inner, max_size=3).map("".join)
        | st.builds(lambda group, x: group.format(x), groups, inner)
        | st.builds(lambda x, repeat: f"(?:{x}){repeat}", inner, st.sampled_from(REPEATS))
        | st.lists(inner, min_size=2, max_size=3).map(lambda x: f"({'|'.join(x)})")
    )


PATTERNS = st.recursive(st.sampled_from(PIECES), grown, max_leaves=8)
PATHS = st.lists(st.text("ab1_-.\né٣² ", min_size=1, max_size=8), min_size=1, max_size=4)


def by_re(given_patterns, paths):
    """Return the values as PEFT looks them up."""
    return {
        path: value
        for path in paths
        for pattern, value in reversed(given_patterns.items())
        if re.match(rf"(.*\.)?({pattern})$", path)
    }


@settings(max_examples=1500, deadline=None, derandomize=True)
@given(st.lists(PATTERNS, min_size=1, max_size=3), PATHS)
def test_a_path_has_the_value_of_the_first_pattern_that_re_would_match(keys, paths):
    given_patterns = {key: number for number, key in enumerate(keys)}
    assert values_by_path(given_patterns, paths) == by_re(given_patterns, paths)


@pytest.mark.parametrize(
    "pattern",
    ["a?" * 200 + "a" * 200, "(x|x)" * 60 + "y", r"\\*" * 60 + "y", "(.*)*y", "((a*)*)*y",
     "(a|ab)(c|bcd)(d*)" * 50, ".*" * 200 + "y"],
)  # fmt: skip
@pytest.mark.parametrize("path", ["a" * 200 + "b", "x" * 60, "\\" * 200, "abcd" * 50 + "."])
def test_a_pattern_for_which_re_never_ends_is_matched(pattern, path):
    assert values_by_path({pattern: 1}, [path, f"m.{path}"]) == {}


def test_a_pattern_for_which_re_never_ends_still_matches():
    assert matches_any("a?" * 200 + "a" * 200, ["m." + "a" * 300])
    assert matches_any("(x|x)" * 60 + "y", ["m." + "x" * 60 + "y"])


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        (r"(a)\1", "it has a backreference, which needs more than one pass"),
        ("(a)?(?(1)b|c)", "it has a conditional group, which"),
        ("(?=a)b", "it has lookaround, which"),
        ("(?<!a)b", "it has lookaround, which"),
        ("(?>a)", "it has an atomic group, which"),
        ("a*+", "it has a possessive repeat, which"),
        ("(?i:a)", "it has flags, which are not supported"),
        ("(?i)a", "it has flags, which are not supported"),
        ("(", "missing ), unterminated subpattern at position 0"),
        ("a{99999999999}", "the repetition number is too large"),
        ("(?:a{1000}){1000}", "at most 500000 parts, repeats counted"),
        ("(?:(?:){99999}){99999}", "at most 500000 parts, repeats counted"),
        ("(" + "(?:)" * 2000 + "a){300000}", "at most 500000 parts, repeats counted"),
        (f"({'a' * 5000}){{400}}", "at most 500000 parts, repeats counted"),
        ("x" * 10_001, "it has 10001 letters, and the limit is 10000"),
        ("(" * 3000 + "a" + ")" * 3000, "too many brackets"),
    ],
)
def test_a_pattern_that_one_pass_cannot_match_is_refused_by_name(pattern, reason):
    with pytest.raises(ValueError, match=re.escape(reason)) as raised:
        values_by_path({"q_proj": 1, pattern: 2}, ["a"])
    assert str(raised.value).startswith(f"the pattern {pattern!r} ")


def test_patterns_and_paths_that_need_too_many_steps_are_refused(monkeypatch):
    monkeypatch.setattr(patterns, "STEP_LIMIT", 10_000)
    given_patterns = {".*a" + "b?." * 100: 1}
    assert values_by_path(given_patterns, ["a"]) == {}
    for paths in (
        ["aab" * 70],
        [f"{number:07b}".replace("1", "a") * 9 for number in range(99)],
        ["b" * 10_001],
    ):
        with pytest.raises(ValueError, match="need more than 10000 steps to match the paths"):
            values_by_path(given_patterns, paths)
    for pattern, path in (
        ("a?" * 200 + "b", "a" * 200),
        (f"[^{''.join(map(chr, range(500, 2500, 2)))}-]*", "xyzuvw12345"),
    ):
        with pytest.raises(ValueError, match="need more than 10000 steps to match the paths"):
            values_by_path({pattern: 1}, [path])


def test_a_name_for_each_module_takes_few_steps():
    """Each of 500 patterns is a whole path, as the tools for ranks by layer write them."""
    paths = [f"model.layers.{number}.{name}_proj" for number in range(125) for name in "qkvo"]
    numbers = {path: number for number, path in enumerate(paths)}
    assert values_by_path(numbers, paths) == numbers
    anchored = {f"^{re.escape(path)}": number for path, number in numbers.items()}
    assert values_by_path(anchored, paths) == numbers


def test_forgetting_the_kept_states_changes_nothing(monkeypatch):
    given_patterns, paths = {r"1\..*": 2, r".*\.[qk]": 1}, [f"{n}.{x}" for n in "12" for x in "qkv"]
    kept = values_by_path(given_patterns, paths)
    monkeypatch.setattr(patterns, "_KEPT_LIMIT", 0)
    automaton = patterns._Automaton(given_patterns)
    assert [automaton.first_match(path) for path in paths] == [0, 0, 0, 1, 1, None]
    assert len(automaton._moves) == 1
    assert values_by_path(given_patterns, paths) == kept == {
        "1.q": 2, "1.k": 2, "1.v": 2, "2.q": 1, "2.k": 1,
    }  # fmt: skip
