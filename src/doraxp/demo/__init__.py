"""The experiment of `doraxp demo`: a frozen network learns turned digits, by several methods.

`split_digits` gives the digits themselves, to other programs too.
"""

from doraxp.demo._digits import Digits, load_digits, split_digits
from doraxp.demo._experiment import CHECKPOINTS, experiment
from doraxp.demo._networks import PLANS
from doraxp.demo._picture import save_picture
from doraxp.demo._results import BaseRun, Results, Run, Settings, Spread, report
from doraxp.demo._table import print_results

__all__ = [
    "CHECKPOINTS",
    "PLANS",
    "BaseRun",
    "Digits",
    "Results",
    "Run",
    "Settings",
    "Spread",
    "experiment",
    "load_digits",
    "print_results",
    "report",
    "save_picture",
    "split_digits",
]
