r"""Regular expressions for the ends of module paths. PEFT reads its `rank_pattern` the same way.

A pattern matches a path if it matches the whole path, or everything after one of the dots:
"q_proj" and "0.q_proj" match "layers.0.q_proj", and "proj" does not. The rule is
``re.match(rf"(.*\.)?({pattern})$", path)``.

Patterns come from strangers' files, and `re` may need 2ⁿ steps for n letters. So all patterns
together become one automaton (Thompson, 1968). It reads each path once and follows all ways to
match at the same time: the steps are at most the letters of the paths times the nodes.

    node      a number: reads a letter, chooses, checks an assertion such as ``^``, or is an end
    states    the nodes where the ways are between two letters
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeAlias, TypeVar

Value = TypeVar("Value")

LENGTH_LIMIT, SIZE_LIMIT, STEP_LIMIT = 10_000, 500_000, 5_000_000
"""Letters of one pattern; nodes of all patterns; steps for all paths, which take a few seconds."""
_KEPT_LIMIT = 1_000_000
"""Sum of the sizes of the kept sets of states. Beyond it they are forgotten."""
# The parser of `re` itself: another one would read some pattern in another way.
_parser: Any = importlib.import_module("re._parser")
_Tree: TypeAlias = Any
_States: TypeAlias = frozenset[int]
_Set: TypeAlias = tuple[tuple[str, Any], ...]
"""The entries of a set of letters, names and values, as the parser has them."""


def values_by_path(patterns: Mapping[str, Value], paths: Iterable[str]) -> dict[str, Value]:
    """Return a value for each path that a pattern matches: that of the first such pattern.

    Raises
    ------
    ValueError
        A pattern is malformed, too large, or has a part that cannot be matched in one pass:
        a backreference, lookaround, an atomic group, a possessive repeat or flags. Or the
        patterns and the paths together need too many steps.
    """
    automaton, values = _Automaton(patterns), list(patterns.values())
    firsts = {path: automaton.first_match(path) for path in paths}
    return {path: values[first] for path, first in firsts.items() if first is not None}


def matches_any(pattern: str, paths: Iterable[str]) -> bool:
    """Return whether the pattern matches at least one of the paths."""
    return bool(values_by_path({pattern: True}, paths))


class _Letter(NamedTuple):
    test: str | _Set
    target: int


class _Choice(NamedTuple):
    targets: tuple[int, ...]


class _Assertion(NamedTuple):
    name: str
    target: int


class _End(NamedTuple):
    pattern: int


_Node: TypeAlias = _Letter | _Choice | _Assertion | _End


class _Place(NamedTuple):
    """The properties of a place between two letters of a path."""

    is_start: bool
    """A pattern may begin to match here: the path begins, or follows a dot."""
    is_first: bool
    is_last: bool
    """The path ends here, or one line feed is left."""
    is_end: bool
    is_boundary: bool
    """A letter of a word is on one side only."""


class _Automaton:
    """All patterns at once."""

    def __init__(self, patterns: Iterable[str]) -> None:
        self._nodes: list[_Node] = []
        self._parts = self._steps = self._kept = 0
        self._moves: dict[tuple[_States, _Place, str], _States] = {}
        self._starts: _States = frozenset(
            self._add_pattern(number, pattern) for number, pattern in enumerate(patterns)
        )

    def first_match(self, path: str) -> int | None:
        """Return the number of the first pattern that matches the path, or None."""
        states: _States = frozenset()
        ends: list[int] = []
        self._count(len(path))
        for place, letter in _places(path):
            if place.is_last:
                reached = self._reached(states | self._starts if place.is_start else states, place)
                ends += (node.pattern for node in reached if isinstance(node, _End))
            if letter:
                moved = self._move(states, place, letter)
                if place.is_start:  # by themselves: they are many, and the same at each dot
                    started = self._move(self._starts, place, letter)
                    moved = moved | started if moved and started else moved or started
                states = moved
        return min(ends, default=None)

    def _move(self, states: _States, place: _Place, letter: str) -> _States:
        """Return the states after one more letter."""
        key = (states, place, letter)
        moved = self._moves.get(key)
        if moved is None:
            moved = frozenset(
                node.target
                for node in self._reached(states, place)
                if isinstance(node, _Letter) and self._accepts(node.test, letter)
            )
            self._kept += len(moved) + 1
            if self._kept > _KEPT_LIMIT:
                self._moves.clear()
                self._kept = 0
            self._moves[key] = moved
        return moved

    def _reached(self, states: _States, place: _Place) -> Iterator[_Node]:
        """Yield each node that the ways reach before they read another letter."""
        seen, left = set(states), list(states)
        while left:
            self._count(1)
            node = self._nodes[left.pop()]
            yield node
            if isinstance(node, _Choice):
                targets = node.targets
            elif isinstance(node, _Assertion) and _ASSERTIONS[node.name](place):
                targets = (node.target,)
            else:
                continue
            for target in targets:
                if target not in seen:
                    seen.add(target)
                    left.append(target)

    def _accepts(self, test: str | _Set, letter: str) -> bool:
        """Return whether a letter passes the test of a node."""
        if isinstance(test, str):
            return test == letter
        self._count(len(test))
        negated = test[:1] == (("NEGATE", None),)
        return negated != any(_ENTRIES[name](of, letter) for name, of in test)

    def _count(self, steps: int) -> None:
        self._steps += steps
        if self._steps > STEP_LIMIT:
            raise ValueError(f"the patterns need more than {STEP_LIMIT} steps to match the paths")

    def _add_pattern(self, number: int, pattern: str) -> int:
        """Add the nodes of a pattern, and return the first."""
        try:
            if len(pattern) > LENGTH_LIMIT:
                raise ValueError(f"it has {len(pattern)} letters, and the limit is {LENGTH_LIMIT}")
            tree = _parser.parse(pattern)
            if tree.state.flags != re.UNICODE:
                raise ValueError("it has flags, which are not supported")
            return self._sequence(tree, self._add(_End(number)))
        except RecursionError:
            raise ValueError(f"the pattern {pattern!r} has too many brackets") from None
        except (re.error, ValueError, OverflowError) as error:
            raise ValueError(f"the pattern {pattern!r} cannot be matched: {error}") from None

    def _add(self, node: _Node) -> int:
        self._nodes.append(node)
        return len(self._nodes) - 1

    def _grow(self) -> None:
        """Count a part of a pattern, each time that it is repeated."""
        self._parts += 1
        if self._parts > SIZE_LIMIT:
            raise ValueError(f"the patterns must have at most {SIZE_LIMIT} parts, repeats counted")

    def _sequence(self, tree: _Tree, target: int) -> int:
        """Add the nodes that match the items of a tree and go on at `target`."""
        self._grow()
        for operation, value in reversed(list(tree)):
            self._grow()
            target = self._item(str(operation), value, target)
        return target

    def _item(self, name: str, value: Any, target: int) -> int:
        match name:
            case "LITERAL":
                return self._add(_Letter(chr(value), target))
            case "NOT_LITERAL":
                test: _Set = (("NEGATE", None), ("LITERAL", value))
                return self._add(_Letter(test, target))
            case "ANY":
                return self._add(_Letter((("NEGATE", None), ("LITERAL", ord("\n"))), target))
            case "IN":
                return self._add(_Letter(tuple((str(op), of) for op, of in value), target))
            case "AT":
                return self._add(_Assertion(str(value), target))
            case "BRANCH":
                _, trees = value
                return self._add(_Choice(tuple(self._sequence(tree, target) for tree in trees)))
            case "SUBPATTERN":
                _, added, removed, tree = value
                if added or removed:
                    raise ValueError("it has flags, which are not supported")
                return self._sequence(tree, target)
            case "MAX_REPEAT" | "MIN_REPEAT":
                least, most, tree = value
                return self._repeat(least, most, tree, target)
        part = _OTHER_PARTS.get(name, name)
        raise ValueError(f"it has {part}, which needs more than one pass over a path")

    def _repeat(self, least: int, most: Any, tree: _Tree, target: int) -> int:
        if most == _parser.MAXREPEAT:
            loop = self._add(_Choice(()))
            self._nodes[loop] = _Choice((self._sequence(tree, loop), target))
            target, most = loop, least
        out = target
        for _ in range(most - least):
            target = self._add(_Choice((self._sequence(tree, target), out)))
        for _ in range(least):
            target = self._sequence(tree, target)
        return target


def _places(path: str) -> Iterator[tuple[_Place, str]]:
    """Yield each place of a path with the letter after it; the letter of the last one is empty."""
    line = path.find("\n") % (len(path) + 1)  # a line feed ends the reach of `.*`
    last = len(path) - path.endswith("\n")
    before, was_word = "", False
    for position, letter in enumerate([*path, ""]):
        is_first, is_word = position == 0, _is_word(letter)
        yield (
            _Place(
                is_first or (before == "." and position <= line),
                is_first,
                position >= last,
                not letter,
                is_word != was_word,
            ),
            letter,
        )
        before, was_word = letter, is_word


def _is_word(letter: str) -> bool:
    return letter.isalnum() or letter == "_"


_OTHER_PARTS = {
    "ASSERT": "lookaround",
    "ASSERT_NOT": "lookaround",
    "ATOMIC_GROUP": "an atomic group",
    "GROUPREF": "a backreference",
    "GROUPREF_EXISTS": "a conditional group",
    "POSSESSIVE_REPEAT": "a possessive repeat",
}
_ASSERTIONS: dict[str, Callable[[_Place], bool]] = {
    "AT_BEGINNING": lambda place: place.is_first,
    "AT_BEGINNING_STRING": lambda place: place.is_first,
    "AT_END": lambda place: place.is_last,
    "AT_END_STRING": lambda place: place.is_end,
    "AT_BOUNDARY": lambda place: place.is_boundary,
    "AT_NON_BOUNDARY": lambda place: not place.is_boundary,
}
_CATEGORIES: dict[str, Callable[[str], bool]] = {
    "DIGIT": str.isdecimal,
    "SPACE": str.isspace,
    "WORD": _is_word,
}


def _in_category(code: Any, letter: str) -> bool:
    name = str(code).removeprefix("CATEGORY_")
    return _CATEGORIES[name.removeprefix("NOT_")](letter) != name.startswith("NOT_")


_ENTRIES: dict[str, Callable[[Any, str], bool]] = {
    "NEGATE": lambda _, letter: False,
    "LITERAL": lambda code, letter: code == ord(letter),
    "RANGE": lambda ends, letter: ends[0] <= ord(letter) <= ends[1],
    "CATEGORY": _in_category,
}
"""The kinds of entries of a set."""
