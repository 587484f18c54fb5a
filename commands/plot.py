"""How all pictures look: colours, lines, fonts; a figure made, and written as PNG or as SVG for a page.

The colours are those of Okabe and Ito (2008), "Color Universal Design", which colour-blind people tell apart. Each goes
with a line style and a marker of its own, so that a picture in grey says the same.
"""

import io
import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from config import shown
from formats import files

BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"
INK, GREY = "#1a1c1e", "#7f868d"  # text; what stands behind the data
DPI = 110
LONGEST_TITLE = 90  # characters

# Fonts with Chinese, Japanese and Korean characters, by the systems that bring them. The first one found is used.
CJK_FONTS = ("Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "Source Han Sans SC", "WenQuanYi Micro Hei",
             "WenQuanYi Zen Hei", "PingFang SC", "Hiragino Sans GB", "Heiti SC", "Microsoft YaHei", "SimHei",
             "Malgun Gothic", "Yu Gothic", "Droid Sans Fallback", "Arial Unicode MS")


@dataclass(frozen=True)
class Line:
    """How one line of a picture looks. `dashes`: lengths of stroke and gap in line widths; () is a whole line."""

    colour: str
    dashes: tuple[float, ...]
    marker: str

    def options(self, n_points: int) -> dict[str, Any]:
        """For `Axes.plot`; about 20 of the points have a marker."""
        return {"color": self.colour, "linestyle": (0, self.dashes) if self.dashes else "-", "marker": self.marker,
                "markevery": max(1, n_points // 20), "markersize": 4, "linewidth": 1.6}


DEV, TRAIN = Line(BLUE, (), "o"), Line(VERMILION, (5, 2), "s")
LINES = (DEV, TRAIN, Line(GREEN, (1, 1.2), "^"), Line(PURPLE, (6, 2, 1, 2), "D"), Line(ORANGE, (9, 2), "v"),
         Line(SKY, (3, 1.5), "P"), Line(INK, (6, 2, 1, 2, 1, 2), "X"), Line(GREY, (), "*"))


# --------------------------------------------------------------------------- a figure


@contextmanager
def drawing() -> Iterator[None]:
    """Inside, matplotlib draws in this style, and says nothing: a missing glyph is no news to a person who trains."""
    import matplotlib

    log = logging.getLogger("matplotlib")
    level = log.level
    style: Any = {"font.family": ["DejaVu Sans", *cjk_fonts()[:1]], "font.size": 9, "axes.titlesize": 9,
             "axes.labelsize": 9, "text.parse_math": False, "axes.spines.top": False, "axes.spines.right": False,
             "axes.unicode_minus": False, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK,
             "xtick.color": INK, "ytick.color": INK, "axes.grid": True, "grid.color": GREY, "grid.alpha": 0.3,
             "legend.frameon": False, "legend.fontsize": 8, "svg.fonttype": "none", "svg.hashsalt": "minllama"}
    with warnings.catch_warnings(), matplotlib.rc_context(style):
        warnings.simplefilter("ignore")
        log.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            log.setLevel(level)


def figure(width: float, height: float, title: str = "", layout: Any = "constrained") -> Any:
    """An empty figure of so many inches, which needs no screen."""
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), layout=layout)
    if title:
        made.suptitle(one_line(title), fontsize=10)
    return made


def page_figure(width: float, height: float, **margins: float) -> Any:
    """An empty figure of so many inches for `svg`, with margins as `Figure.subplots_adjust` takes them. They are given,
    not found out by drawing it twice: a report has many pictures."""
    made = figure(width, height, layout="none")
    made.subplots_adjust(**{"left": 0.17, "right": 0.94, **margins})
    return made


def one_line(text: str, longest: int = LONGEST_TITLE) -> str:
    """A text that is one line of a picture; where it is too long its middle is left out."""
    plain = " ".join(shown(text).split())
    half = (longest - 1) // 2
    return plain if len(plain) <= longest else f"{plain[:longest - 1 - half]}…{plain[-half:]}"


def legend_above(axes: Any) -> None:
    """The legend in one row above the axes, where it covers no line."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        axes.legend(handles, labels, loc="lower left", bbox_to_anchor=(0, 1), ncols=len(handles), borderaxespad=0.2,
                    columnspacing=1.2, handlelength=2.6, borderpad=0)


def fit(axes: Any, *series: Sequence[float], least: float = -np.inf, most: float = np.inf) -> None:
    """Fit the y axis to the finite values, with a little room around them, and so that a difference of a hundredth does
    not fill it. What is drawn beside them (a line of chance) does not count. `least` and `most`: where the axis ends at
    the latest."""
    values = np.concatenate([np.asarray(one, dtype=float) for one in series]) if series else np.array([])
    values = values[np.isfinite(values)]
    if not len(values):
        axes.set_yticks([])
        axes.text(0.5, 0.5, "no finite number", transform=axes.transAxes, ha="center", va="center", color=GREY)
        return
    low, high = float(values.min()), float(values.max())
    if low > 0 and high > 30 * low:  # a run that diverged: on a linear axis the rest would be a flat line
        axes.set_yscale("log")
        axes.set_ylim(low / 1.3, high * 1.3)
        plain_numbers(axes.yaxis)
        return
    around = max(0.08 * (high - low), 0.05 * abs(high) - 0.5 * (high - low)) or 0.05
    axes.set_ylim(max(least, low - around), min(most, high + around))


def plain_numbers(axis: Any) -> None:
    """The numbers of an axis of rates, or of one with a logarithmic scale, as one types them: 1e-05, 0.1, 100."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, position: f"{value:.4g}"))
    axis.set_minor_formatter(NullFormatter())


def chance_line(axes: Any, loss: float, n_classes: int) -> None:
    """The loss of guessing among C classes, ln C: drawn where the axis reaches it, else named in the legend."""
    low, high = axes.get_ylim()
    label = f"chance, ln {n_classes} = {loss:.2f}"
    if low <= loss <= high:
        axes.axhline(loss, color=GREY, linestyle=":", linewidth=1.4, label=label)
    else:
        axes.plot([], [], color=GREY, linestyle=":", linewidth=1.4,
                  label=f"{label} ({'above' if loss > high else 'below'})")


# --------------------------------------------------------------------------- fonts


@cache
def cjk_fonts() -> tuple[str, ...]:
    """The installed families of CJK_FONTS."""
    from matplotlib import font_manager

    there = {font.name for font in font_manager.fontManager.ttflist}
    return tuple(name for name in CJK_FONTS if name in there)


def can_draw(texts: Sequence[str]) -> bool:
    """Has one of the fonts each character of the texts?"""
    from matplotlib import font_manager

    fonts = [font_manager.get_font(font_manager.findfont(name)) for name in ("DejaVu Sans", *cjk_fonts()[:1])]
    return all(any(font.get_char_index(ord(c)) for font in fonts) for c in set("".join(texts)) if not c.isspace())


# --------------------------------------------------------------------------- files


def save(made: Any, path: Path) -> None:
    """Write a figure as PNG."""
    files.write_atomically(path, lambda temporary: made.savefig(temporary, dpi=DPI, format="png"), follow=False)


def svg(made: Any, name: str, description: str) -> str:
    """A figure as an SVG that stands inside of a page: the same text for the same figure; its ids begin with `name`, so
    that those of several figures are not the same ones; its ink is the page's text colour, light or dark.

    `description`: what it shows, for those who hear the page.
    """
    from matplotlib.ticker import MaxNLocator

    for axes in made.axes:  # half of the time goes into the ticks, and into finding out where a label has room
        inches = axes.get_position().height * made.get_figheight()
        for axis, most in ((axes.xaxis, 5), (axes.yaxis, 5 if inches > 0.8 else 3)):
            if isinstance(axis.get_major_locator(), MaxNLocator):
                axis.get_major_locator().set_params(nbins=most)
        left, _, width, _ = axes.get_position().bounds
        axes.yaxis.set_label_coords(-0.13 / width, 0.5)
        axes.xaxis.set_label_coords(0.5, -0.26 / (made.get_figheight() * axes.get_position().height))
    out = io.StringIO()
    made.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    text = out.getvalue()
    text = text[text.index("<svg"):]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", text, flags=re.DOTALL)
    used = set(re.findall(r"(?:href=\"#|url\(#)([^\")]+)", text))
    text = re.sub(r' id="([^"]+)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", text)
    text = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", text).replace("xlink:href", "href")
    text = re.sub(r"(font: [\d.]+px) [^;\"]*", r"\1 system-ui, sans-serif", text).replace(INK, "currentColor")
    text = re.sub(r"\n\s*\n+", "\n", text)
    label = description.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    return re.sub(r"<svg[^>]*?viewBox=\"([\d. -]+)\"[^>]*>", rf'<svg role="img" aria-label="{label}" viewBox="\1">',
                  text, count=1).strip()
