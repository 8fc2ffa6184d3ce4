"""Curves as PNG or SVG files, drawn by matplotlib where that is installed."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kvik.cli.options import check_output_path
from kvik.errors import InvalidInput
from kvik.files.output import whole_file

SUFFIXES = (".png", ".svg")


@dataclass(frozen=True, slots=True)
class Line:
    """One curve and its name in the legend."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    dashed: bool = False


@dataclass(frozen=True, slots=True)
class Panel:
    """One pair of axes; with `log` both count in powers of ten."""

    title: str
    x_label: str
    y_label: str
    lines: Sequence[Line]
    log: bool = False


def check_plot_path(option: str, path: Path) -> None:
    """Raise `InvalidInput` before any work for a picture that could not be written in the end."""
    if path.suffix.lower() not in SUFFIXES:
        raise InvalidInput(f"{option} is {path}", hint=f"give a file name that ends in {' or '.join(SUFFIXES)}")
    check_output_path(option, path)
    if importlib.util.find_spec("matplotlib") is None:
        raise InvalidInput(f"{option} needs matplotlib", hint="install it: pip install 'kvik[plot]'")


def save_plot(path: Path, title: str, panels: Sequence[Panel]) -> None:
    """Draw panels side by side into a file of the format that its name says. Raises `InvalidInput`."""
    os.environ.setdefault("MPLBACKEND", "agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5 * len(panels), 4.2), dpi=130, layout="constrained")
    figure.suptitle(title)
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for line in panel.lines:
            marker = "" if len(line.x) > 60 else "."
            axes.plot(line.x, line.y, "--" if line.dashed else "-", marker=marker, label=line.name)
        if panel.log:
            axes.set_xscale("log")
            axes.set_yscale("log")
        axes.set(title=panel.title, xlabel=panel.x_label, ylabel=panel.y_label)
        axes.grid(alpha=0.3)
        axes.legend()
    with whole_file(path) as partial:
        figure.savefig(partial, format=path.suffix[1:].lower())
