"""The types of a diagnosis."""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias

from doraxp._core.kinds import KindName
from doraxp.checkpoint._doctor_rows import RowCounts
from doraxp.layers import Targets

Level: TypeAlias = Literal["error", "warning", "note"]


class Finding(NamedTuple):
    """One thing to know before training."""

    level: Level
    """"error": training breaks, in PEFT or here. "warning": it may. "note": all else."""
    code: str
    """A stable name, such as "zero-rows"."""
    text: str
    """A sentence, and the one thing to do."""
    modules: tuple[str, ...] = ()
    """The modules that it is about, by path; tensors that are not weights of modules by name."""


class DiagnosedModule(NamedTuple):
    """A module with a weight that may be adapted."""

    kind: KindName | None
    """The name of its `LayerKind`. This and the next three are None if it cannot be read."""
    shape: tuple[int, ...] | None
    """The shape that the weight is stored in; of a quantised weight the one it is read in."""
    dtype: str | None
    """As safetensors files name it: "BF16"; of a quantised weight the one it is read in."""
    parameters: int | None
    """The numbers of the weight."""
    quantised: str | None
    """The format of a quantised weight, such as "nf4 64"; None for others."""
    is_target: bool
    """Whether it gets an adapter."""
    left_out: str | None
    """Why "all-linear" leaves it out, as `doraxp.layers.Targets` has it; None if it does not."""
    rows: RowCounts | None
    """Its rows, counted; None if it cannot be read."""


class Cost(NamedTuple):
    """The size of an adapter for all targets at one rank."""

    rank: int
    parameters: int
    """The trained numbers: A, B and m."""
    percent: float
    """100 · trained numbers / numbers of the base."""
    adapter_bytes: int
    """A, B and m in float32."""
    adamw_bytes: int
    """The two moments of AdamW in float32."""
    too_small: int
    """Targets with fewer rows or columns than the rank: `adapt` refuses them. They count above."""


class Diagnosis(NamedTuple):
    """The answer of `diagnose`."""

    modules: dict[str, DiagnosedModule]
    """All modules with a weight that may be adapted, by path."""
    targets: Targets
    """The modules that get an adapter, and the patterns that match no module."""
    tied: dict[str, str]
    """By name of a tensor, the embedding that it is too. The file may lack the former."""
    costs: tuple[Cost, ...]
    """One for each rank."""
    findings: tuple[Finding, ...]
    """Errors first, then warnings, then notes."""
    parameters: int
    """The numbers of the base that can be read."""
    bytes: int
    """The bytes of the base on disk."""

    @property
    def breaks(self) -> bool:
        """Whether a finding is an error."""
        return any(finding.level == "error" for finding in self.findings)
