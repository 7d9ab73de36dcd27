"""The experiment of `doraxp demo`: a frozen network learns turned digits, by several methods."""

from doraxp.demo._experiment import CHECKPOINTS, experiment
from doraxp.demo._networks import PLANS
from doraxp.demo._picture import save_picture
from doraxp.demo._results import BaseRun, Results, Run, Settings, Spread, report
from doraxp.demo._table import print_results

__all__ = [
    "CHECKPOINTS",
    "PLANS",
    "BaseRun",
    "Results",
    "Run",
    "Settings",
    "Spread",
    "experiment",
    "print_results",
    "report",
    "save_picture",
]
