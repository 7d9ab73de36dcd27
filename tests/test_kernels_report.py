"""The rules of `benchmarks/kernels.py`, on machine code as NVIDIA's disassembler prints it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "kernels.py"
LOAD, NARROW_LOAD = "LDG.E.128.CONSTANT R4, desc[UR4][R2.64]", "@P0 LDG.E.U16 R4, desc[UR4][R2.64]"
STORE, NARROW_STORE = "STG.E.128 desc[UR4][R2.64], R8", "@!P1 STG.E.U16 desc[UR4][R2.64+0x2], R8"
SMALL = "LDG.E R5, desc[UR4][R6.64]"


@pytest.fixture(scope="module")
def report():
    spec = importlib.util.spec_from_file_location("kernels_report", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def code(*lines):
    """Return the text of a kernel."""
    made = "".join(f"        /*{16 * i:04x}*/   {line} ;\n" for i, line in enumerate(lines))
    return f'//-------- .text.{{name}} --------\n\t.section\t.text.{{name}},"ax"\n.L_x_1:\n{made}'


def rules_broken_by(report, lines, types="bfloat16 float32 float32", name="cast"):
    found = report.functions(code(*lines).replace("{name}", name))
    compiled = report.Compiled(32, 0, 0, *report.accesses(found[name]))
    return list(report.broken_rules(name, types, compiled))


def test_accesses_are_counted_by_their_bytes(report):
    found = report.functions(code(LOAD, SMALL, STORE, NARROW_STORE).replace("{name}", "one"))
    loads, stores = report.accesses(found["one"])
    assert loads == report.Bytes(wide=1, narrow=1, narrow_bytes=4)
    assert stores == report.Bytes(wide=1, narrow=1, narrow_bytes=2)
    wider = "LDG.E.ENL2.256.CONSTANT R8, R4, desc[UR4][R2.64]"
    others = "LDS.128 R4, [R2]", "LDC.64 R2, c[0x0][0x210]", "STS [R2], R4", "LDL R4, [R1]"
    loads, stores = report.accesses(code(wider, "LDG.E.64 R4, [R2.64]", *others))
    assert loads == report.Bytes(wide=1, narrow=1, narrow_bytes=8)
    assert stores == report.Bytes()


def test_each_kernel_has_its_own_code(report):
    text = code(LOAD).replace("{name}", "one") + code(STORE, STORE).replace("{name}", "two")
    made = {name: report.accesses(each) for name, each in report.functions(text).items()}
    assert {name: (one.wide, two.wide) for name, (one, two) in made.items()} == {
        "one": (1, 0), "two": (0, 2),
    }  # fmt: skip


def test_a_ragged_way_may_move_as_many_bytes_as_the_packed_one(report):
    lines = [LOAD, *[NARROW_LOAD] * 8, STORE, *[NARROW_STORE] * 8]
    assert rules_broken_by(report, lines) == []
    assert rules_broken_by(report, [*lines, NARROW_LOAD]) == [
        "narrow loads of 18 bytes, more than 16"
    ]
    assert rules_broken_by(report, [*lines, NARROW_STORE]) == [
        "narrow stores of 18 bytes, more than 16"
    ]


def test_packs_stored_number_by_number_break_a_rule(report):
    """The compiler has merged the stores of both ways."""
    lines = [LOAD, *[NARROW_LOAD] * 8, *[NARROW_STORE] * 8]
    assert rules_broken_by(report, lines) == [
        "0 stores of 16 bytes, fewer than 1", "narrow stores of 16 bytes, more than 0",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("types", "tiles"),
    [("bfloat16 bfloat16 float32", 2 * 4), ("bfloat16 float32 float32", 3 * 4)],
)
def test_tiles_do_not_count_as_packs_of_the_weight(report, types, tiles):
    """`merge` loads tiles by 16 bytes in any case; its loads of W must be as wide."""
    lines, small = [LOAD] * tiles + [STORE], [SMALL] * report.PASSES["merge"].few_loads

    def broken(*more):
        return rules_broken_by(report, [*lines, *small, *more], types, "merge")

    assert broken() == [f"{tiles} loads of 16 bytes, fewer than {tiles + 1}"]
    assert broken(LOAD) == []
    assert broken(LOAD, *[SMALL] * 5)


def test_a_pass_on_tensor_cores_needs_all_its_packs(report):
    rules = report.PASSES["mixed_gradients"]
    loads, stores = [LOAD] * rules.loads, [STORE] * rules.stores
    assert rules_broken_by(report, [*loads, *stores], name="mixed_gradients") == []
    assert rules_broken_by(report, [*loads[1:], *stores], name="mixed_gradients")
    assert rules_broken_by(report, [*loads, *stores[1:]], name="mixed_gradients")
    for types in ("float32 float32 float32", "bfloat16 float64 float64"):  # it returns at once
        assert rules_broken_by(report, [], types, "mixed_gradients") == []


def test_builds_that_are_not_launched_may_break_the_rules(report):
    assert rules_broken_by(report, [], "float64 float64 float64", "merge") == []
    assert rules_broken_by(report, [], "bfloat16 float32 float32", "merge_wide") == []
    assert rules_broken_by(report, [], "float64 float64 float64", "merge_wide")


def test_spilled_registers_break_a_rule_in_any_kernel(report):
    spilled = report.Compiled(255, 0, 8, report.Bytes(), report.Bytes())
    assert list(report.broken_rules("adamw", "float32 float32 float32", spilled)) == [
        "8 bytes spilled or on the stack"
    ]
