"""A picture of a results file: each contender's time as a multiple of the limit's, one panel a question and case.

    python benchmarks/plot_kernels.py benchmarks/results/MACHINE.json docs/kernels.png

Bars are medians, whiskers the fastest and slowest round, the dashed line is the limit measured in the same rounds; hatched bars are
this package's, so that the picture reads in black and white. Contenders for context alone (another task) are left out.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

_PANEL_INCHES = (5.2, 2.4)


def main(results: Path, picture: Path) -> None:
    panels = defaultdict(list)
    for row in json.loads(results.read_text()):
        panels[row["question"], row["case"], row["dtype"]].append(row)
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    size = (_PANEL_INCHES[0] * columns, _PANEL_INCHES[1] * lines)
    figure, axes = plt.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained")
    for axis, (key, rows) in zip(axes.flat, sorted(panels.items()), strict=False):
        _panel(axis, " ".join(key), rows)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    figure.savefig(picture, dpi=110)


def _panel(axis: plt.Axes, title: str, rows: list[dict]) -> None:
    limits = [row["seconds"] for row in rows if row["role"] == "limit"]
    unit = limits[0] if limits else min(row["seconds"] for row in rows)
    shown = sorted((r for r in rows if r["role"] in ("ours", "peer")), key=lambda r: -r["seconds"])
    for place, row in enumerate(shown):
        ours = row["role"] == "ours"
        middle, low, high = (row[k] / unit for k in ("seconds", "seconds_low", "seconds_high"))
        axis.barh(
            place, middle, color="#2b6cb0" if ours else "#b8bec7", hatch="///" if ours else None, edgecolor="white",
            xerr=[[middle - low], [high - middle]], error_kw={"lw": 0.8, "ecolor": "#444"},
        )  # fmt: skip
        axis.text(high, place, f"  {middle:.2f}", va="center", fontsize=7)
    axis.axvline(1, ls="--", lw=0.8, color="black")
    axis.set_xlim(0, axis.get_xlim()[1] * 1.15)
    axis.set_yticks(range(len(shown)), [row["contender"] for row in shown], fontsize=7)
    axis.tick_params(axis="x", labelsize=7)
    axis.set_title(f"{title}: time / limit", fontsize=8)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
