"""What every figure of a report shares: its value, its colours, its letters."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from mtl_dist.report.results import CALIBRATED, CONSTANT, ENSEMBLE, Method

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

DPI = 150
# Okabe and Ito's colours, told apart with every colour blindness; yellow is too pale for lines.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#7F3C00", "#5E4FA2")
SPECIAL = {CONSTANT: "#777777", ENSEMBLE: "#D55E00", CALIBRATED: "#111111"}
MARKERS = "osD^vPX"
HATCHES = ("", "////", "....", "xxxx", "----", "oooo")
INK, GRID = "#24292f", "#d8dce1"


class Figure(NamedTuple):
    """A figure with the data behind it, as <name>.png and <name>.csv."""

    name: str
    title: str
    caption: str
    alt: str  # what it shows, for those who do not see it
    png: bytes
    csv: bytes
    is_photo: bool = False  # the page takes a JPEG of it
    is_wide: bool = False  # takes the page's whole width
    is_dense: bool = False  # scrolls on a phone, rather than being made as small as that


class Style(NamedTuple):
    """How a method is drawn in every figure."""

    colour: str
    marker: str
    hatch: str = ""  # of bars, which have no markers


def method_styles(methods: list[Method]) -> dict[str, Style]:
    """A colour, a marker and a hatch for every method; the constant predictor's and the ensemble's never change."""
    styles = {label: Style(colour, "*") for label, colour in SPECIAL.items()}
    others = [method.label for method in methods if method.label not in SPECIAL]
    for place, label in enumerate(others):
        # With each round of colours markers and hatches move on, so that no two methods look the same.
        turn, colour = divmod(place, len(COLOURS))
        hatch = HATCHES[turn % len(HATCHES)]
        styles[label] = Style(COLOURS[colour], MARKERS[(colour + turn) % len(MARKERS)], hatch)
    return styles


@contextlib.contextmanager
def canvas(width: float, height: float) -> Iterator[Canvas]:
    """Give an empty figure of this size in inches, in the report's style; no window, no global state."""
    import matplotlib
    from matplotlib.figure import Figure as Canvas

    settings = {
        "font.family": "DejaVu Sans",
        "font.size": 10,
        "axes.edgecolor": "#8b929a",
        "axes.labelcolor": INK,
        "axes.titlesize": 10.5,
        "axes.titleweight": "bold",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": GRID,
        "grid.linewidth": 0.6,
        "text.color": INK,
        "text.parse_math": False,  # a "$" in a run's name is a "$"
        "xtick.color": INK,
        "ytick.color": INK,
        "legend.frameon": False,
        "legend.fontsize": 9,
        "lines.linewidth": 1.6,
    }
    with matplotlib.rc_context(settings):
        yield Canvas(figsize=(width, height), layout="constrained", facecolor="white")


def save_png(figure: Canvas, *, dpi: int = DPI) -> bytes:
    """A figure as PNG bytes, the same for the same figure."""
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=dpi, bbox_inches="tight", pad_inches=0.1, metadata={"Software": None})
    return data.getvalue()
