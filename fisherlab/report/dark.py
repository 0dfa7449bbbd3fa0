"""Figures that turn dark with the page that shows them: paper and ink, hues kept."""

from __future__ import annotations

import colorsys
import re
from typing import Final

PAPER: Final = (0x17, 0x18, 0x1A)
"""What stands behind everything in dark mode, as in `page.css`."""
_INK: Final = (0xE7, 0xE6, 0xE3)
_GREY: Final = 0.12  # spread of the channels up to which a colour is a grey
_CONTRAST: Final = 5.0  # of lines to the paper
_LIGHTER: Final = 0.05  # of the way to white, a step
Colour = tuple[float, ...]  # red, green, blue


def adaptive(svg: str) -> str:
    """Add to a drawing what its colours are where a reader prefers dark pages.

    Greys change places between paper and ink. Other colours stay where they stand out
    from the dark paper, and become lighter where they do not.

    Examples
    --------
    >>> found = adaptive('<svg><path style="fill: #ffffff; stroke: #0072b2"/></svg>')
    >>> "fill: #17181a" in found, "stroke: #0093e5" in found
    (True, True)
    """
    known = sorted(set(re.findall(r"(?:fill|stroke): (#[0-9a-f]{6})", svg)))
    rules = ["svg { fill: " + _hex(_INK) + " }"]  # what has no colour is black
    for colour in known:
        dark = in_the_dark(colour)
        rules += [
            f'[style*="{what}: {colour}"] {{ {what}: {dark} !important }}'
            for what in ("fill", "stroke")
            if f"{what}: {colour}" in svg
        ]
    media = "@media screen and (prefers-color-scheme: dark)"
    sheet = f"<style>{media} {{ {' '.join(rules)} }}</style>"
    return re.sub(r"<svg[^>]*>", lambda head: head[0] + sheet, svg, count=1)


def in_the_dark(colour: str) -> str:
    """Return what a colour on white paper becomes on dark paper.

    Examples
    --------
    >>> in_the_dark("#ffffff"), in_the_dark("#000000"), in_the_dark("#e69f00")
    ('#17181a', '#e7e6e3', '#e69f00')
    """
    red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    channels = red, green, blue
    if max(channels) - min(channels) <= _GREY:
        white = sum(channels) / 3
        mixed = (p * white + i * (1 - white) for p, i in zip(PAPER, _INK, strict=True))
        return _hex(tuple(mixed))
    hue, light, full = colorsys.rgb_to_hls(*channels)
    while contrast(channels) < _CONTRAST and light < 1:
        light = min(1.0, light + _LIGHTER)
        channels = colorsys.hls_to_rgb(hue, light, full)
    return _hex(tuple(255 * c for c in channels))


def contrast(channels: Colour) -> float:
    """Return how a colour (channels from 0 to 1) stands out from the dark paper.

    References
    ----------
    Web Content Accessibility Guidelines 2.2, "contrast ratio".

    Examples
    --------
    >>> round(contrast((1.0, 1.0, 1.0)))
    18
    """
    own, paper = (_luminance(one) for one in (channels, tuple(c / 255 for c in PAPER)))
    return (max(own, paper) + 0.05) / (min(own, paper) + 0.05)


def _luminance(channels: Colour) -> float:
    linear = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def _hex(channels: Colour) -> str:
    return "#" + "".join(f"{round(c):02x}" for c in channels)
