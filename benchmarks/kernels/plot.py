"""Draws a results file: for each case, how many times slower than the limit every contender is.

python -m benchmarks.kernels.plot benchmarks/results/<machine>.json docs/kernels.svg
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib
from matplotlib import pyplot as plt

matplotlib.use("Agg")
COLOURS = {"ours": "#0b6e4f", "peer": "#b3b3b3", "context": "#dcdcdc"}


def draw(rows: list[dict[str, object]], target: Path) -> None:
    cases = sorted({(str(r["question"]), str(r["case"]), str(r["dtype"])) for r in rows})
    figure, axes = plt.subplots(len(cases), 1, figsize=(9, 2.3 * len(cases)), squeeze=False, layout="constrained")
    for axis, case in zip(axes[:, 0], cases, strict=True):
        shown = [r for r in rows if (r["question"], r["case"], r["dtype"]) == case and r["role"] != "limit"]
        shown = sorted((r for r in shown if r["ratio_to_limit"]), key=lambda r: float(str(r["ratio_to_limit"])))
        times = [1 / float(str(r["ratio_to_limit"])) for r in shown]
        bars = axis.barh([str(r["contender"]) for r in shown], times, color=[COLOURS[str(r["role"])] for r in shown])
        axis.bar_label(bars, [f"{t:.1f}x" for t in times], padding=3, fontsize=8)
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_xscale("log")
        axis.set_title(" ".join(case), fontsize=9, loc="left")
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(x=0.15)
    figure.supxlabel("time, in units of the limit measured in the same run (1 = limit)", fontsize=8)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, metadata={"Date": None} if target.suffix == ".svg" else None)


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit("usage: python -m benchmarks.kernels.plot RESULTS.json TARGET.svg|png")
    draw([row for row in json.loads(Path(sys.argv[1]).read_text()) if "contender" in row], Path(sys.argv[2]))


if __name__ == "__main__":
    main()
