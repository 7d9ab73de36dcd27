"""Tests of DoRA: named cases with their reasons, a float64 reference and bounds for rounding."""

from doraxp.testing._cases import Case, OptimizerCase
from doraxp.testing._catalogue import VERSION, catalogue
from doraxp.testing._compare import (
    Agreement,
    Comparison,
    Figure,
    check_usable,
    compare_backends,
)
from doraxp.testing._conventions import Conventions
from doraxp.testing._diagnosis import Diagnosis
from doraxp.testing._expected_failures import (
    ExpectedFailure,
    Judgement,
    judge,
    read_expected_failures,
)
from doraxp.testing._implementation import check_implementation
from doraxp.testing._junit import junit
from doraxp.testing._libraries import Library, as_numpy
from doraxp.testing._operator_cases import OperatorCase, operator_catalogue
from doraxp.testing._operator_reference import expected_of_operator
from doraxp.testing._optimizer_cases import optimizer_catalogue
from doraxp.testing._parts import functions_of
from doraxp.testing._reference import Expected, expected, expected_steps
from doraxp.testing._report import Finding, NeverReturned, Raised, Ran, Refused, Report, grouped
from doraxp.testing._sum_cases import SumCase, expected_of_sum, sum_catalogue
from doraxp.testing._update_cases import UpdateCase, expected_of_update, update_catalogue
from doraxp.testing._vectors import write_vectors
from doraxp.testing._wrong_merges import right_merge, wrong_merges, wrong_merges_across_rows

__all__ = [
    "VERSION",
    "Agreement",
    "Case",
    "Comparison",
    "Conventions",
    "Diagnosis",
    "Expected",
    "ExpectedFailure",
    "Figure",
    "Finding",
    "Judgement",
    "Library",
    "NeverReturned",
    "OperatorCase",
    "OptimizerCase",
    "Raised",
    "Ran",
    "Refused",
    "Report",
    "SumCase",
    "UpdateCase",
    "as_numpy",
    "catalogue",
    "check_implementation",
    "check_usable",
    "compare_backends",
    "expected",
    "expected_of_operator",
    "expected_of_sum",
    "expected_of_update",
    "expected_steps",
    "functions_of",
    "grouped",
    "judge",
    "junit",
    "operator_catalogue",
    "optimizer_catalogue",
    "read_expected_failures",
    "right_merge",
    "sum_catalogue",
    "update_catalogue",
    "write_vectors",
    "wrong_merges",
    "wrong_merges_across_rows",
]
