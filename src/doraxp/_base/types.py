"""The types that the functions of doraxp exchange: numbers in `Config`, arrays in NamedTuples.

    W  weight     (out, in)      A  lora_a  (rank, in)      B  lora_b  (out, rank)
    m  magnitude  (out,)         s  scaling

Every array may have the same leading axes, a stack: (*stack, out, in) and so on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias, get_args

import numpy as np

from doraxp._base.argument_names import dropout_place, explains_names
from doraxp._base.scalars import check_count, check_flag, check_real

DType: TypeAlias = Any
"""A dtype object of any array library: they have no type in common."""


class Array(Protocol):
    """An array of any library that array-api-compat knows, with the members that the core uses.

    Each library has its own types for keys and operands, so those are not narrowed here.
    """

    @property
    def dtype(self) -> DType:
        """The dtype, an object of the library."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The lengths of the axes."""

    @property
    def ndim(self) -> int:
        """The number of axes."""

    def __getitem__(self, key: Any, /) -> Array: ...
    def __add__(self, other: Any, /) -> Array: ...
    def __radd__(self, other: Any, /) -> Array: ...
    def __sub__(self, other: Any, /) -> Array: ...
    def __rsub__(self, other: Any, /) -> Array: ...
    def __mul__(self, other: Any, /) -> Array: ...
    def __rmul__(self, other: Any, /) -> Array: ...
    def __truediv__(self, other: Any, /) -> Array: ...
    def __rtruediv__(self, other: Any, /) -> Array: ...
    def __matmul__(self, other: Any, /) -> Array: ...
    def __neg__(self) -> Array: ...
    def __invert__(self) -> Array: ...
    def __and__(self, other: Any, /) -> Array: ...
    def __or__(self, other: Any, /) -> Array: ...
    def __lt__(self, other: Any, /) -> Array: ...
    def __le__(self, other: Any, /) -> Array: ...
    def __gt__(self, other: Any, /) -> Array: ...
    def __ge__(self, other: Any, /) -> Array: ...
    def __eq__(self, other: Any, /) -> Array: ...  # type: ignore[override]
    def __ne__(self, other: Any, /) -> Array: ...  # type: ignore[override]
    def __bool__(self) -> bool: ...
    def __float__(self) -> float: ...


class Namespace(Protocol):
    """An array namespace of array-api-compat, whose functions return arrays."""

    bool: DType
    int32: DType
    float32: DType
    float64: DType

    def finfo(self, dtype: DType, /) -> FloatInfo:
        """Return the properties of a floating dtype."""

    def __hash__(self) -> int: ...
    def __getattr__(self, name: str, /) -> Callable[..., Array]: ...


class FloatInfo(Protocol):
    """The properties of a floating dtype that the core uses."""

    eps: float
    max: float
    smallest_normal: float


class RowWeight(Protocol):
    """A frozen weight W (out, in) that is not an array, and gives its rows when it is asked.

    `doraxp.QuantisedWeight` is one. Any other object with these three members is one too, such as
    a reader of a file. `prepare`, `forward`, `backward`, `merge`, `init`, `decompose` and
    `DoRALayer` take it in place of an array. They ask for blocks of rows, from the first to the
    last, and need one block at a time.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in)."""

    @property
    def dtype(self) -> DType:
        """The floating dtype of the rows, an object of their library."""

    def rows(self, rows: slice, /) -> Array:
        """Return some rows, (k, in), in `dtype`; `rows` has a start and a stop.

        The next call may overwrite the array.
        """


HostArray: TypeAlias = np.ndarray[Any, np.dtype[Any]]
"""An array of NumPy, of any shape and dtype."""

Consumed: TypeAlias = Array
"""An array that the function may write to, and may return: its caller reads only the result."""

Reduce: TypeAlias = Callable[[Array], Array]
"""Returns the sum of an array over the ranks: each rank gets the same bits. Writes to no array."""

Form: TypeAlias = Literal["weight", "direction"]
NormGradient: TypeAlias = Literal["exact", "detached"]
Dropout: TypeAlias = Literal["input", "low_rank"]


@explains_names
@dataclass(frozen=True)
class Config:
    """The numbers and choices of one DoRA adapter.

    Parameters
    ----------
    rank : int
        Rank of the update B A; 1 up to min(out, in) of the weight that it is used with.
    alpha : float, optional
        Scales the update. None or a negative value means alpha = rank: then s = 1, or √rank with
        `rslora`.
    rslora : bool
        s = alpha / √rank instead of alpha / rank (arXiv:2312.03732).
    form : {"weight", "direction"}
        V = W + s B A (the paper, PEFT), or V = W/‖W‖ + s B A (the update is in units of the
        row norm). `doraxp.convert_form` goes from one to the other.
    norm_gradient : {"exact", "detached"}
        Whether the gradient goes through the row norm n. "detached" takes n for a constant, as
        the paper's section 4.3 and PEFT do. "exact" is the true gradient, and costs one more
        product with `rank` columns.
    dropout : {"input", "low_rank"}
        The part of the layer that gets the dropped x, where `doraxp.forward` is given a mask:
        everything that the adapter adds to the base ("input", as in PEFT), or the low-rank
        product alone ("low_rank", as in mlx-lm and axolotl).

    Raises
    ------
    TypeError
        `rank` is not an integer, `alpha` is not a number, `rslora` is not a bool, or an argument
        has another name. The message has the name to write for `r`, `lora_alpha` and others.
    ValueError
        `rank` is below 1, `alpha` is 0 or not finite, or `form`, `norm_gradient`
        or `dropout` is unknown.

    Examples
    --------
    >>> Config(rank=8, alpha=16).scaling
    2.0
    >>> Config(rank=16, alpha=16, rslora=True).scaling
    4.0
    """

    rank: int
    alpha: float | None = None
    _: KW_ONLY
    rslora: bool = False
    form: Form = "weight"
    norm_gradient: NormGradient = "exact"
    dropout: Dropout = "input"

    def __post_init__(self) -> None:
        object.__setattr__(self, "rank", check_count("rank", self.rank, least=1))
        check_flag("rslora", self.rslora)
        if self.alpha is not None:
            alpha = check_real("alpha", self.alpha, rule="a number or None")
            object.__setattr__(self, "alpha", alpha)
            if alpha == 0 or not math.isfinite(alpha):
                raise ValueError(
                    "alpha must be finite and not 0 (None or a negative value means alpha = rank), "
                    f"got {alpha}"
                )
        if self.form not in get_args(Form):
            raise ValueError(f"form must be one of {get_args(Form)}, got {self.form!r}")
        if self.norm_gradient not in get_args(NormGradient):
            raise ValueError(
                f"norm_gradient must be one of {get_args(NormGradient)}, got {self.norm_gradient!r}"
            )
        if self.dropout not in get_args(Dropout):
            is_rate = isinstance(self.dropout, int | float) and not isinstance(self.dropout, bool)
            place = f": {dropout_place(self.dropout)}" if is_rate else ""
            raise ValueError(
                f"dropout must be one of {get_args(Dropout)}, got {self.dropout!r}{place}"
            )

    @property
    def scaling(self) -> float:
        """The factor s = alpha / rank, or alpha / √rank with `rslora`."""
        alpha = self.rank if self.alpha is None or self.alpha < 0 else self.alpha
        return alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


class Adapter(NamedTuple):
    """The trained parameters of one layer, or their gradients."""

    lora_a: Array
    """A, shape (*stack, rank, in)."""
    lora_b: Array
    """B, shape (*stack, out, rank)."""
    magnitude: Array
    """m, shape (*stack, out)."""


class Gradients(NamedTuple):
    """The results of `doraxp.backward`: the gradients of the loss by the inputs of the forward."""

    x: Array
    """dx, in the shape and dtype of x; None where x has ids, which have no gradient."""
    adapter: Adapter
    """dA, dB and dm, in the compute dtype."""
    weight: Array | None
    """dW, in the compute dtype; None unless `train_base`."""
    bias: Array | None
    """dbias, in the compute dtype; None unless `train_base` and a bias was given."""


Snapshot: TypeAlias = Adapter | list[bytes] | tuple[str, ...]
"""The values of A, B and m at one time: copies of the arrays, their bytes, or names that stand for
their values."""


class AdamWLeaves(NamedTuple):
    """The arrays of a step of AdamW: those of one parameter are at one place of the four lists.

    They have the same shape.
    """

    params: Sequence[Array]
    """p, in its own dtype."""
    grads: Sequence[Array]
    """g, in its own dtype."""
    mu: Sequence[Array]
    """Running mean of g, in the compute dtype of p."""
    nu: Sequence[Array]
    """Running mean of g², in the compute dtype of p."""


class AdamWStepped(NamedTuple):
    """The results of a step of AdamW, in the order of the parameters."""

    params: Sequence[Array]
    """p, in its own dtype."""
    mu: Sequence[Array]
    """Running mean of g."""
    nu: Sequence[Array]
    """Running mean of g²."""


class AdamWNumbers(NamedTuple):
    """The numbers of one step of AdamW that all parameters share, in Python's double precision."""

    beta1: float
    """β₁."""
    rest1: float
    """1 − β₁."""
    beta2: float
    """β₂."""
    rest2: float
    """1 − β₂."""
    eps: float
    """ε."""
    correction1: float | Array
    """1 − β₁ᵗ; a 0-d array where the step t is traced."""
    correction2: float | Array
    """1 − β₂ᵗ; a 0-d array where the step t is traced."""
