"""What holds of every figure."""

from itertools import combinations

from matplotlib.figure import Figure
from matplotlib.text import Text


def assert_texts_apart(figure: Figure) -> None:
    """Fail where two texts of a figure that are drawn upright lie on one another."""
    figure.canvas.draw()
    undrawn = _undrawn(figure)
    boxes = [
        (text.get_text(), text.get_window_extent())
        for text in figure.findobj(Text)
        if text.get_visible()
        and text.get_text().strip()
        and not text.get_rotation() % 90
        and id(text) not in undrawn
    ]
    for (one, a), (other, b) in combinations(boxes, 2):
        wide = min(a.x1, b.x1) - max(a.x0, b.x0)
        high = min(a.y1, b.y1) - max(a.y0, b.y0)
        assert min(wide, high) < 1, (one, other)


def _undrawn(figure: Figure) -> set[int]:
    """Return the labels of ticks that lie outside their axis, or are switched off."""
    found = set()
    for axis in (axis for ax in figure.axes for axis in (ax.xaxis, ax.yaxis)):
        shown = {id(tick) for tick in axis._update_ticks()}
        for tick in [*axis.get_major_ticks(), *axis.get_minor_ticks()]:
            for label in (tick.label1, tick.label2):
                if id(tick) not in shown or not label.get_visible():
                    found.add(id(label))
    return found
