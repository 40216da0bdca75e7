"""What a study found, as tables and plain sentences: the content of report.html and of summary.md.

A sentence claims a difference only where its interval leaves out 0 (the primary contrast) or its Holm-adjusted p is
below 0.05 (the rest); otherwise it says that the data cannot tell. No sentence knows which way a study should come out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from omni_fast.curriculum.scores import Estimate, holm
from omni_fast.report.charts import ERROR_HEADS, duration
from omni_fast.report.verdict import Sentence, Tone, direction, points, span
from omni_fast.study import analysis, analysis_entropy, analysis_orders
from omni_fast.study.analysis import JOINT, MERGE, ArmRow, TransferPart, declared
from omni_fast.study.analysis_draws import Contrast
from omni_fast.study.analysis_entropy import ALL, EntropyPart
from omni_fast.study.analysis_orders import AVERAGE, NO_TRANSFER, TWIN, AssumptionPart, ForecastPart, OrderPart
from omni_fast.study.records import Study

LEVEL = 0.05
FULL = ("joint", "order", "refresh", "online", "sft", "merge")  # kinds of arms with the whole budget


@dataclass(frozen=True, slots=True)
class Findings:
    """Everything computed from a study; a part is None where the records do not support it (yet).

    primary: the declared contrast.   pairs: (arm, over) -> contrast that the sentences need besides those of the table.
    """

    study: Study
    rows: list[ArmRow]
    primary: Contrast
    pairs: dict[tuple[str, str], Contrast]
    transfer: TransferPart | None
    forecast: ForecastPart | None
    orders: OrderPart | None
    assumptions: AssumptionPart | None
    entropy: EntropyPart | None
    warnings: list[str]
    missing: list[str]

    @property
    def first(self) -> ArmRow | None:
        """The row of the primary contrast's first arm."""
        return next((row for row in self.rows if row.arm.name == self.study.primary[0]), None)


Value = str | int | float | Estimate
Row = Sequence[Value]


@dataclass(frozen=True, slots=True)
class Table:
    """A table; the first `words` columns are words, the others numbers. folded: a drawing above it shows the same."""

    title: str
    heads: Sequence[str]
    rows: Sequence[Row]
    words: int = 1
    folded: bool = False

    def cells(self) -> list[list[str]]:
        return [[cell(value) for value in row] for row in self.rows]

    def markdown(self) -> str:
        rule = [":---"] * self.words + ["---:"] * (len(self.heads) - self.words)
        rows = [[text.replace("|", "\\|") for text in row] for row in (self.heads, rule, *self.cells())]
        return "\n".join([f"### {self.title}", "", *(f"| {' | '.join(row)} |" for row in rows)])


def analyse(study: Study) -> Findings:
    """All parts of the analysis that the records allow."""
    rows, primary = analysis.table(study)
    first, at = study.arm(study.primary[0]), analysis_orders.realised(study)
    full = first is not None and first.kind in FULL
    others = [name for name in ("reversed", "random") if full and name not in study.primary]
    return Findings(
        study=study,
        rows=rows,
        primary=primary,
        pairs={(study.primary[0], other): analysis.compare(study, study.primary[0], other) for other in others},
        transfer=analysis.transfer_part(study),
        forecast=analysis_orders.forecast_part(study, at) if at else None,
        orders=analysis_orders.order_part(study, at) if at else None,
        assumptions=analysis_orders.assumption_part(study, at) if at else None,
        entropy=analysis_entropy.entropy_part(study, at),
        warnings=analysis.warnings(study),
        missing=analysis.missing(study),
    )


def p_value(p: float) -> str:
    return "–" if math.isnan(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"


def cell(value: Value) -> str:
    """A contrast as +0.047 (+0.011 to +0.083), a score as 0.711 (0.67 to 0.75), other numbers plainly."""
    if isinstance(value, Contrast):
        middle, low_high = points(value.value), span(value)
    elif isinstance(value, Estimate):
        middle, low_high = points(value.value, signed=False), span(value, digits=2).replace("+", "")
    elif isinstance(value, float):
        return points(value, signed=False).replace("-", "−")
    else:
        return value if isinstance(value, str) else f"{value:,}"
    return f"{middle} ({low_high})".replace(" to ", "\u00a0to\u00a0") if low_high else middle


def percent(contrast: Contrast) -> str:
    if not math.isfinite(contrast.value):
        return "–"
    shown = f"{contrast.value:+.1%} ({contrast.low:+.1%} to {contrast.high:+.1%})"
    return shown.replace("-", "−").replace("%", "\u00a0%")


def arrow(order: Iterable[str]) -> str:
    return " → ".join(order)


def tables(found: Findings) -> dict[str, list[Table]]:
    """Section of the report -> its tables; those without a row are left out."""
    parts: dict[str, Iterable[Table]] = {
        "arms": _arms(found),
        "cost": _cost(found),
        "transfer": _transfer(found.transfer) if found.transfer else (),
        "orders": _orders(found.orders) if found.orders else (),
        "forecast": _forecast(found.forecast) if found.forecast else (),
        "assumptions": _assumptions(found.assumptions) if found.assumptions else (),
        "entropy": _entropy(found.entropy) if found.entropy else (),
        "flips": _flips(found),
    }
    return {name: [each for each in made if each.rows] for name, made in parts.items()}


def _arms(found: Findings) -> Iterator[Table]:
    scores: list[Row] = []
    gains: list[Row] = []
    for row in found.rows:
        scores.append((row.arm.name, len(row.seeds), *row.scores.values(), row.average, row.bwt))
        p = "primary" if declared(found.study, row.arm.name) else p_value(row.p_holm)
        gains.append((row.arm.name, row.over_joint, percent(row.relative_joint), p, percent(row.relative_merge)))
    yield Table("Test scores", ["arm", "seeds", *found.study.tasks, "average", "backward transfer"], scores)
    heads = ["arm", f"minus {JOINT}", f"relative to {JOINT}", "p (Holm)", f"relative to {MERGE}"]
    yield Table("Average score against joint training and against merging", heads, gains)


def _cost(found: Findings) -> Iterator[Table]:
    rows: list[Row] = []
    for row in found.rows:
        orders = " / ".join(f"{arrow(order)} ({count}x)" for order, count in row.orders.items()) or "–"
        training, transfer, items, seconds = row.cost
        counts = map(round, (training, transfer, training + transfer, items))
        rows.append((row.arm.name, *counts, duration(seconds), orders))
    heads = ["arm", "training samples", "to measure transfer", "both", "items for it", "training time", "order (seeds)"]
    yield Table("Cost, mean of the seeds", heads, rows)


def _transfer(part: TransferPart) -> Iterator[Table]:
    effects = [(f"{i} → {j}", effect, p_value(effect.p)) for (i, j), effect in part.effects.items() if i != j]
    yield Table("Transfer, each effect", ["trained → scored on", "T", "p (alone)"], effects, folded=True)
    rows: list[Row] = []
    for row in part.proxies:
        a = row.agreement
        agree = (points(a.spearman), points(a.kendall), f"{a.pairs:.0%}", max(0.0, a.regret))
        rows.append((row.name, f"{row.training:.0%}", f"{row.evaluation:.0%}", *agree))
    heads = ["cheap measurement", "training", "evaluation", "Spearman", "Kendall", "pairs alike", "summed score lost"]
    yield Table(
        "One seed's cheap measurement against the full matrix of the other seeds, or its own if alone", heads, rows
    )


def _orders(part: OrderPart) -> Iterator[Table]:
    rows = [(arrow(order), score, gain) for order, score, gain in part.ranked]
    heads = ["order", "average score", "minus the mean of all"]
    yield Table(f"Every order over {len(part.seeds)} seeds", heads, rows, folded=True)


def _forecast(part: ForecastPart) -> Iterator[Table]:
    rows = [
        (name, e.n, e.mean_absolute, points(e.bias), e.rmse, points(e.pearson), points(e.spearman))
        for name, e in part.errors.items()
    ]
    yield Table("Error against realised scores of new seeds (correlations within task)", ERROR_HEADS, rows)


def _assumptions(part: AssumptionPart) -> Iterator[Table]:
    adjusted = holm({pair: s.p for pair, (_, _, s) in part.constant.items()})
    rows: list[Row] = [
        (pair, points(first), shift, s.starts, s.sd, s.noise, p_value(adjusted.get(pair, math.nan)))
        for pair, (first, shift, s) in part.constant.items()
    ]
    heads = ["effect", "T from the start", "change once j is trained", "starts", "spread", "noise", "p (Holm)"]
    yield Table("Assumption 1: is T the same from every checkpoint?", heads, rows)
    second, rows = holm({task: c.p for task, c in part.second_pass.items()}), []
    for task in dict.fromkeys([*part.saturation, *part.second_pass]):
        s = part.saturation.get(task)
        spread: list[Value] = [s.sd, s.noise, p_value(s.p)] if s else ["–"] * 3
        rows.append((task, part.second_pass.get(task, "–"), p_value(second.get(task, math.nan)), *spread))
    heads = ["task", "change by a second pass", "p (Holm)", "spread over starts", "noise", "p of the spread"]
    yield Table("Assumption 2: does one stage bring a task to the same score, wherever it starts?", heads, rows)


def _entropy(part: EntropyPart) -> Iterator[Table]:
    known = {name: r for name, r in part.residuals.items() if r.change.seeds}
    residuals = [(name, r.before, r.after, r.change, f"{r.at_edge:.0%}") for name, r in known.items()]
    title = "What the forecast misses, sampled at temperature 1 and at 1 / the effective temperature"
    yield Table(title, ["task", "at 1", "corrected", "change", "beyond the sweep"], residuals)
    rows = [(f"{w:g}", arrow(order), gain or "the same order") for w, (order, gain) in part.ablation.items()]
    heads = ["price, score per nat", "order", "average score against the order without it"]
    yield Table("Entropy-aware order, looked up among the realised ones", heads, rows, words=2)


def _flips(found: Findings) -> Iterator[Table]:
    rows = [
        (row.arm.name, *(f"−{lost} +{gained}" for lost, gained in row.flips.values()))
        for row in found.rows
        if row.arm.kind != "base"
    ]
    title = "Test items lost (−) and gained (+) since the initial policy, summed over the seeds"
    yield Table(title, ["arm", *found.study.tasks], rows)


def headline(found: Findings) -> Sentence:
    """The declared contrast, whatever it says."""
    (first, second), contrast = found.study.primary, found.primary
    if absent := [name for name in found.study.primary if found.study.arm(name) is None]:
        text = f"The declared contrast is {first} − {second}; this study has no arm {' and no arm '.join(absent)}."
        return Sentence("open", text)
    if not math.isfinite(contrast.value):
        return Sentence("open", f"The declared contrast, {first} − {second}, is not measured yet.")
    size, tone = f"{points(contrast.value)} (95 % interval {span(contrast)})", _tone(contrast)
    if contrast.seeds < 2:
        text = f"With one seed {first} − {second} is {size}; the seed's own noise is not in it: no claim."
        return Sentence("open", text)
    what = {
        "good": f"{first} beats {second}: its average test score is ahead by",
        "bad": f"{first} falls behind {second}: its average test score differs by",
        "open": f"The data do not tell {first} from {second}: their average test scores differ by",
    }[tone]
    return Sentence(tone, f"{what} {size}, over {contrast.seeds} seeds.")


def verdict(found: Findings) -> list[Sentence]:
    """What the data supports and what it does not, most important first; what is not rejected stays open."""
    return [
        *_against_the_rest(found),
        *_does_order_matter(found),
        *(_is_it_forecast(found.forecast) if found.forecast else ()),
        *(_do_assumptions_hold(found.assumptions) if found.assumptions else ()),
        *(_is_it_entropy(found.entropy) if found.entropy else ()),
        *_is_it_cheap(found),
        *(Sentence("bad", warning) for warning in found.warnings),
    ]


def _tone(contrast: Contrast, less: bool = False) -> Tone:
    """good: the whole interval above 0; bad: below 0; open: it holds 0, is not known, or rests on one seed.

    less: is better, so the other way round.
    """
    tone = "open" if contrast.seeds < 2 else direction(contrast) or "open"
    turned: dict[Tone, Tone] = {"good": "bad", "bad": "good", "open": "open"}
    return turned[tone] if less else tone


def _against_the_rest(found: Findings) -> Iterator[Sentence]:
    told: dict[Tone, list[str]] = {"good": [], "bad": [], "open": []}
    for row in found.rows:
        if math.isfinite(row.p_holm):
            told["open" if row.p_holm >= LEVEL else "good" if row.over_joint.value > 0 else "bad"].append(row.arm.name)
    for (tone, names), what in zip(told.items(), ("Ahead of", "Behind", "Not told from"), strict=True):
        if names:
            yield Sentence(tone, f"{what} {JOINT} after Holm's correction: {', '.join(names)}.")
    if (first := found.first) and math.isfinite((gain := first.relative_joint).value):
        merge = first.relative_merge
        over_merge = f", over {MERGE} {percent(merge)}" if math.isfinite(merge.value) else ""
        text = f"Relative gain of {first.arm.name}'s average score over {JOINT} {percent(gain)}{over_merge}."
        yield Sentence(_tone(gain), text)


def _does_order_matter(found: Findings) -> Iterator[Sentence]:
    if (part := found.orders) is not None:
        matters = part.p < LEVEL
        said = "order matters" if matters else "order does not matter"
        sd = f"true standard deviation about {part.sd:.3f}; " if matters else ""
        p = p_value(part.p) if part.p < 0.001 else f"= {p_value(part.p)}"
        text = (
            f"All {len(part.means)} orders were run with {len(part.seeds)} seeds: {said} beyond noise (p {p}; {sd}the best and"
            f" the worst, chosen on the other seeds, differ by {cell(part.gap)})."
        )
        yield Sentence("good" if matters else "open", text)
        if part.solved is not None:
            order, gain = part.solved
            said = {"good": "better than", "bad": "worse than", "open": "not told from"}[_tone(gain)]
            place = 1 + sum(other.value > gain.value for _, other in part.means.values())
            text = (
                f"The order solved on other seeds, {arrow(order)}, is {said} the mean of all orders: {cell(gain)}; it is"
                f" number {place} of {len(part.means)}."
            )
            yield Sentence(_tone(gain), text)
    for (arm, other), contrast in found.pairs.items():
        if math.isfinite(contrast.value):
            said = {"good": "ahead of", "bad": "behind", "open": "not told from"}[_tone(contrast)]
            text = f"At the same budget, {arm} is {said} {other} (uncorrected): {cell(contrast)}."
            yield Sentence(_tone(contrast), text)
    if (transfer := found.transfer) is not None and (decision := transfer.decision).second is not None:
        told = decision.optima == 1 and _tone(transfer.lead) == "good"
        text = (
            f"The best order by measured transfer, {arrow(decision.order)}, is the optimum in {decision.probability or 0:.0%}"
            f" of the draws over {'seeds and items' if len(transfer.seeds) > 1 else 'the items of one seed'}; it is"
            f" {'told' if told else 'not told'} from the second best, {arrow(decision.second)}."
        )
        yield Sentence("good" if told else "open", text)


def _is_it_forecast(part: ForecastPart) -> Iterator[Sentence]:
    additive, ratios, none = (part.errors[k] for k in ("additive", "multiplicative", NO_TRANSFER))
    twin, level = part.errors.get(TWIN), _tone(part.closer, less=True)
    ranks, orders = all(r > 0 for r in part.by_seed), part.errors[f"additive{AVERAGE}"].pearson
    same = agree = ""
    if twin:
        same = f", the same order in another seed by {twin.mean_absolute:.3f}"
        average = part.errors[f"{TWIN}{AVERAGE}"].pearson
        agree = f"; two seeds of one order agree to {points(twin.pearson)} and {points(average)}"
    judged = {
        "good": "It is closer than assuming no transfer",
        "bad": "It is farther off than assuming no transfer",
        "open": "In level it is no better than assuming no transfer, beyond noise",
    }[level]
    text = (
        f"On new seeds the additive forecast is off by {additive.mean_absolute:.3f} on average, that of ratios by"
        f" {ratios.mean_absolute:.3f}, no transfer at all by {none.mean_absolute:.3f}{same}. {judged} (by seed"
        f" {points(part.closer.value)}, {span(part.closer) or 'one seed'})."
    )
    yield Sentence(level, text)
    text = (
        f"The additive forecast correlates with realised scores: {points(additive.pearson)} within task (by seed"
        f" {', '.join(points(r) for r in part.by_seed)}), and {points(orders)} for the average over tasks, which decides the"
        f" order{agree}.{'' if ranks else ' The sign within task is not the same in every seed.'}"
        f"{' It does not tell good orders from bad ones.' if orders <= 0 else ''}"
    )
    alone = len(part.by_seed) < 2
    yield Sentence("open" if alone else "bad" if orders <= 0 else "good" if ranks and orders > 0 else "open", text)


def _do_assumptions_hold(part: AssumptionPart) -> Iterator[Sentence]:
    if tested := rejected({pair: s.p for pair, (_, _, s) in part.constant.items()}):
        broken = sum(tested.values())
        spreads = [s for _, _, s in part.constant.values() if math.isfinite(s.p)]
        sd, noise = (math.sqrt(np.mean([getattr(s, k) ** 2 for s in spreads])) for k in ("sd", "noise"))
        text = (
            f"Assumption 1 (constant transfer) is {f'rejected for {broken}' if broken else 'not rejected for any'} of"
            f" {len(tested)} effects: over starting checkpoints T spreads by {sd:.3f}, noise removed, where one measurement has"
            f" a noise of {noise:.3f} (root mean squares)."
        )
        yield Sentence("bad" if broken else "open", text)
    if second := rejected({task: c.p for task, c in part.second_pass.items()}):
        moved = [f"{task} {points(part.second_pass[task].value)}" for task, no in second.items() if no]
        largest = max(abs(part.second_pass[task].value) for task in second)
        text = (
            f"Assumption 2 (saturation) is rejected by a second pass for: {', '.join(moved)}."
            if moved
            else f"A second pass changes no task beyond noise (largest change {largest:.3f}): assumption 2 is not rejected by it."
        )
        yield Sentence("bad" if moved else "open", text)
    if starts := rejected({task: s.p for task, s in part.saturation.items()}):
        uneven = [f"{task} (spread {part.saturation[task].sd:.3f})" for task, no in starts.items() if no]
        text = (
            f"What a task's own stage reaches depends on where it starts for: {', '.join(uneven)}."
            if uneven
            else "What a task's own stage reaches does not depend on where it starts beyond noise."
        )
        yield Sentence("bad" if uneven else "open", text)


def rejected(p_values: Mapping[str, float]) -> dict[str, bool]:
    """Whether each p that is known is below the level after Holm's correction."""
    return {name: p < LEVEL for name, p in holm(p_values).items()}


def _is_it_entropy(part: EntropyPart) -> Iterator[Sentence]:
    whole = part.residuals.get(ALL)
    if whole is not None and whole.change.seeds:
        tone = _tone(whole.change, less=True)
        what = {"good": "shrinks", "bad": "widens", "open": "does not change beyond noise"}[tone]
        outside = f" ({whole.at_edge:.0%} of the scores only as far as the sweep reaches)" if whole.at_edge > 0 else ""
        text = (
            f"Decoding each policy at its own effective temperature {what} what the forecast misses: from {whole.before:.3f} to"
            f" {whole.after:.3f}, change {cell(whole.change)}{outside}."
        )
        yield Sentence(tone, text)
    if moved := {weight: gain for weight, (_, gain) in part.ablation.items() if gain is not None}:
        weight, gain = max(moved.items(), key=lambda pair: abs(pair[1].value))
        text = f"Pricing entropy changes the solved order; at weight {weight:g} the change is worth {cell(gain)} (uncorrected)."
        yield Sentence(_tone(gain), text)
    elif part.ablation:
        yield Sentence("open", "Pricing entropy changes the solved order at no weight tried.")


def _is_it_cheap(found: Findings) -> Iterator[Sentence]:
    if (part := found.transfer) is not None:
        text = (
            f"Evaluating until the order is settled would save {part.saved:.0%} of one seed's transfer evaluations; it settled"
            f" in {part.settled:.0%} of the seeds and gave the full measurement's order in {part.same_order:.0%}."
        )
        yield Sentence("open", text)
    if (row := found.first) and row.cost.samples_train > 0 and row.cost.samples_transfer > 0:
        share = 1 + row.cost.samples_transfer / row.cost.samples_train
        text = f"With the measurement of transfer charged, {row.arm.name} costs {share:.2f} times the samples of its training."
        yield Sentence("open", text)
    budgets = {row.arm.name: row.cost.samples_train for row in found.rows if row.arm.kind in FULL}
    if budgets and max(budgets.values()) > 1.01 * min(budgets.values()):
        listed = ", ".join(f"{name} {samples:,.0f}" for name, samples in budgets.items())
        yield Sentence("bad", f"The budgets are not equal: {listed} training samples.")
