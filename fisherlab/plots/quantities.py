"""What each variable of a result means: title, formula, and which way is better."""

from dataclasses import dataclass
from typing import Final, Literal

import xarray as xr

FLOOR: Final = 1e-6
"""Below this a relative error is a difference of equal numbers, not a measurement."""


def below_floor(error: float) -> bool:
    """Say whether a relative error is at or below the numerical floor.

    Examples
    --------
    >>> below_floor(1e-6), below_floor(2e-6)
    (True, False)
    """
    # A metric may return the floor itself, and a mean of floors may round up.
    return abs(error) <= FLOOR * (1 + 1e-9)


@dataclass(frozen=True)
class Quantity:
    """One measured quantity: how it is named, written, read and ranked.

    `symbol` is mathtext for figures and `formula` plain text for pages; `best`
    says whether a low or a high value, or a value near one, is the closer.

    Examples
    --------
    >>> quantity("frobenius_error").best
    'low'
    """

    name: str
    title: str
    symbol: str = ""
    formula: str = ""
    best: Literal["low", "high", "one", "none"] = "none"
    perfect: float | None = None
    floor: float | None = None
    meaning: str = ""

    @property
    def label(self) -> str:
        """Return the text of an axis: the title and, where known, the symbol."""
        return f"{self.title}  {self.symbol}" if self.symbol else self.title


_ALL: Final = (
    Quantity(
        "frobenius_error",
        "relative error",
        r"$\|F-\hat{F}\|_F\,/\,\|F\|_F$",
        "‖F − F̂‖ / ‖F‖",
        "low",
        0.0,
        FLOOR,
        "Distance from the exact block F to its approximation F̂ in the Frobenius "
        "norm, relative to F. 0 is exact; the zero matrix has 1, and a wrong scale "
        "alone can give more.",
    ),
    Quantity(
        "cosine_similarity",
        "matrix cosine",
        r"$\langle F,\hat{F}\rangle\,/\,\|F\|\,\|\hat{F}\|$",
        "⟨F, F̂⟩ / (‖F‖ ‖F̂‖)",
        "high",
        1.0,
        None,
        "Angle between the two matrices, blind to scale: 1 where F̂ is a positive "
        "multiple of F. An F̂ far off in error but near 1 here only has a wrong scale.",
    ),
    Quantity(
        "direction_cosine",
        "direction cosine",
        r"$\cos((F+\lambda I)^{-1}g,\,(\hat{F}+\lambda I)^{-1}g)$",
        "cos( (F + λI)⁻¹g , (F̂ + λI)⁻¹g )",
        "high",
        1.0,
        None,
        "Angle between the exact damped natural gradient and the one that the "
        "approximation gives, for the gradient g of the loss. 1 means the same step "
        "up to its length.",
    ),
    Quantity(
        "inverse_error",
        "inverse error",
        r"$\|(F+\lambda I)^{-1}-(\hat{F}+\lambda I)^{-1}\|\,/\,\|(F+\lambda I)^{-1}\|$",
        "‖(F + λI)⁻¹ − (F̂ + λI)⁻¹‖ / ‖(F + λI)⁻¹‖",
        "low",
        0.0,
        FLOOR,
        "Relative Frobenius distance of the damped inverses. It depends strongly on "
        "λ: with a large λ every inverse tends to I/λ. A small error of F̂ does "
        "not imply a small error of its inverse.",
    ),
    Quantity(
        "trace_ratio",
        "trace ratio",
        r"$\mathrm{tr}\,\hat{F}\,/\,\mathrm{tr}\,F$",
        "tr F̂ / tr F",
        "one",
        1.0,
        None,
        "1 where the approximation keeps the total curvature of the layer.",
    ),
    Quantity(
        "stored_numbers",
        "stored numbers",
        formula="count",
        meaning="Numbers that the approximation holds; the exact symmetric block of "
        "p parameters counts as p(p+1)/2.",
    ),
    Quantity(
        "solve_flops",
        "flops of one solve",
        formula="count",
        meaning="Floating-point operations of one application of (F̂ + λI)⁻¹ to a "
        "gradient, factorisations already made.",
    ),
)
QUANTITIES: Final = {each.name: each for each in _ALL}


def quantity(name: str, values: xr.DataArray | None = None) -> Quantity:
    """Describe a variable; one that fisherlab does not know keeps its own name.

    Examples
    --------
    >>> quantity("frobenius_error").formula
    '‖F − F̂‖ / ‖F‖'
    >>> quantity("my_metric").title
    'my metric'
    """
    if name in QUANTITIES:
        return QUANTITIES[name]
    attrs = {} if values is None else values.attrs
    return Quantity(name, str(attrs.get("long_name", name.replace("_", " "))))
