"""The `embedded` judge: a small preference head on a frozen model's hidden states. No server, no second model.

score(reply) = w_h . hidden(reply) + w_f . features(reply), fitted once, as a logistic preference (Bradley-Terry) on
generated pairs of a good and a spoiled reply of equal length. Its worth is measured before it is used: with one
family of spoilers left out at a time, on prompts it has not seen, mean AUC >= 0.85, worst family >= 0.70, and at most
2 % of the hack strings accepted. Otherwise `usable` is False, the rubric checks alone judge, and `name` says so.

Value against the reference, with d = score(reply) - score(reference), a log-odds of being preferred:
    min(1, 2 sigmoid(d + spread))    spread: what good replies differ by among themselves
1 is as good as the reference, and the value falls smoothly from there: win / tie / loss alone would leave most groups
of a small model without a difference to learn from. The reason names the verdict: "ok" (d >= -spread), "tie" (nearer to
the reference than to a spoiled reply, d >= -gap / 2), "loss". The reference is a bar, not a rival: what a judge this
small cannot tell it must not pay for.
Limits: English sentences of the short writing task; it knows form, fluency and topic, not taste.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from omni_fast.errors import UserError
from omni_fast.rewards.judge.base import Reply, gated
from omni_fast.rewards.judge.corrupt import FAMILIES, make_pairs
from omni_fast.rewards.judge.encode import Encode
from omni_fast.rewards.judge.features import FEATURES, features
from omni_fast.rewards.judge.hacks import hack_replies
from omni_fast.rewards.judge.rubric import RubricJudge
from omni_fast.rewards.score import Part
from omni_fast.rewards.text_checks import clean

Array = NDArray[np.float64]

MEAN_AUC, WORST_AUC, HACK_ACCEPTANCE = 0.85, 0.70, 0.02  # the bar
ACCEPTED = ("ok", "tie")
_RIDGE = 0.03
_HIDDEN_SHARE = 3.0  # scale of the hidden part before the ridge: it has 40 times the dimensions of the features
_FIT_PAIRS, _TEST_PAIRS = 20, 12  # per family


@dataclass(frozen=True, slots=True)
class Report:
    """How good the head is. auc: family left out -> ROC AUC on held-out prompts. seconds: encoding and fitting."""

    auc: dict[str, float]
    hacks: int
    hacks_accepted: int
    pairs: int
    seconds: float

    @property
    def mean_auc(self) -> float:
        return sum(self.auc.values()) / len(self.auc)

    @property
    def worst_family(self) -> str:
        return min(self.auc, key=self.auc.__getitem__)

    @property
    def usable(self) -> bool:
        reached = self.mean_auc >= MEAN_AUC and self.auc[self.worst_family] >= WORST_AUC
        return reached and self.hacks_accepted <= HACK_ACCEPTANCE * self.hacks

    def describe(self) -> str:
        worst = f"worst family {self.worst_family} {self.auc[self.worst_family]:.2f}"
        hacks = f"{self.hacks_accepted} of {self.hacks} hacks accepted"
        return f"held-out AUC {self.mean_auc:.2f} ({worst}), {hacks}"


@dataclass(frozen=True, slots=True)
class Head:
    """A fitted preference: score = hidden @ w_hidden + features @ w_features; offsets cancel between two replies."""

    w_hidden: list[float]
    w_features: list[float]
    spread: float
    gap: float
    report: Report

    def save(self, path: Path) -> None:
        path.write_text(json.dumps({"format": 1, "features": FEATURES} | asdict(self)), encoding="utf-8")

    @staticmethod
    def load(path: Path) -> Head:
        """Raises UserError when the file is not a head of this version."""
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if data.pop("format") != 1 or tuple(data.pop("features")) != FEATURES:
                raise ValueError("another version wrote it")
            return Head(**{**data, "report": Report(**data["report"])})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is not a judge head ({error}); delete it and it is fitted again") from error


def roc_auc(good: Array, bad: Array) -> float:
    """Chance that a random good score is above a random bad one, ties counted half."""
    difference = good[:, None] - bad[None, :]
    return float((difference > 0).mean() + 0.5 * (difference == 0).mean())


def fit_preference(difference: Array, ridge: float = _RIDGE, iterations: int = 12) -> Array:
    """Minimise mean softplus(-difference @ w) + ridge / 2 |w|^2 by Newton steps. difference: [pairs, D], good - bad."""
    count, width = difference.shape
    w = np.zeros(width)
    for _ in range(iterations):
        p = 1.0 / (1.0 + np.exp(np.clip(difference @ w, -60.0, 60.0)))  # chance of the wrong order
        gradient = ridge * w - difference.T @ p / count
        curvature = (difference * (p * (1.0 - p))[:, None]).T @ difference / count
        step = np.linalg.solve(curvature + ridge * np.eye(width), gradient)
        w -= step
        if np.abs(step).max() < 1e-6:
            break
    return w


def _views(replies: Sequence[Reply], encode: Encode) -> tuple[Array, Array]:
    """What the head sees of each completion, in one encoding call: hidden states [n, H] and cheap features [n, F]."""
    texts = [clean(reply.completion) for reply in replies]
    unique = list(dict.fromkeys(texts))  # equal texts must be worth exactly the same, wherever they stand in a batch
    place = {text: row for row, text in enumerate(unique)}
    hidden = encode(unique).double().numpy()[[place[text] for text in texts]]
    return hidden, np.array([[*features(r.prompt, r.completion, r.required).values()] for r in replies])


def fit_head(encode: Encode, seed: int = 0) -> Head:
    """Generate the pairs, measure the head with each family left out, then fit it on all families.

    The hack strings are judged with the final head; only those that pass the gates need to be encoded.
    """
    start = time.monotonic()
    fit, test = make_pairs(_FIT_PAIRS, 2 * seed), make_pairs(_TEST_PAIRS, 2 * seed + 1)
    every = [*fit, *test]
    good_h, good_f = _views([pair.reply for pair in every], encode)
    bad_h, bad_f = _views([pair.reply.swapped() for pair in every], encode)
    n = len(fit)
    width = good_h.shape[1]
    hidden_scale = _HIDDEN_SHARE / np.sqrt(width) / (np.concatenate([good_h[:n], bad_h[:n]]).std(0) + 1e-6)
    cheap_scale = 1.0 / np.maximum(np.concatenate([good_f[:n], bad_f[:n]]).std(0), 0.05)
    good = np.concatenate([good_h * hidden_scale, good_f * cheap_scale], axis=1)
    bad = np.concatenate([bad_h * hidden_scale, bad_f * cheap_scale], axis=1)
    family = np.array([pair.family for pair in every])

    auc: dict[str, float] = {}
    for name in FAMILIES:
        w = fit_preference((good[:n] - bad[:n])[family[:n] != name])
        left_out = np.flatnonzero(family[n:] == name) + n
        auc[name] = roc_auc(good[left_out] @ w, bad[left_out] @ w)

    w = fit_preference(good[:n] - bad[:n])
    w_hidden, w_features = w[:width] * hidden_scale, w[width:] * cheap_scale  # back to weights of the raw values
    held_good, held_bad = good[n:] @ w, bad[n:] @ w
    gap = float(np.median(held_good) - np.median(held_bad))
    half = len(held_good) // 2
    spread = float(np.quantile(np.abs(held_good[:half] - held_good[half : 2 * half]), 0.9))
    empty = Report(auc, 1, 0, len(every), 0.0)
    head = Head(w_hidden.tolist(), w_features.tolist(), min(spread, gap / 4), gap, empty)

    hacks = hack_replies(seed)
    accepted = sum(part.reason in ACCEPTED for part in verdicts(hacks, encode, head))
    return replace(head, report=Report(auc, len(hacks), accepted, len(every), time.monotonic() - start))


def verdicts(replies: Sequence[Reply], encode: Encode, head: Head) -> list[Part]:
    """Gates first, then reply and reference seen in the same call."""

    def judge(passed: Sequence[Reply]) -> list[Part]:
        if not passed:
            return []
        hidden, cheap = _views([*passed, *(reply.swapped() for reply in passed)], encode)
        score = hidden @ np.array(head.w_hidden) + cheap @ np.array(head.w_features)
        return [_verdict(float(d), head) for d in score[: len(passed)] - score[len(passed) :]]

    return gated(replies, judge)


def _verdict(d: float, head: Head) -> Part:
    reason = "ok" if d >= -head.spread else "tie" if d >= -head.gap / 2 else "loss"
    return Part(round(min(1.0, 2.0 / (1.0 + math.exp(min(60.0, -d - head.spread)))), 2), reason)


class EmbeddedJudge:
    """The judge of the quickstart."""

    def __init__(self, encode: Encode, head: Head) -> None:
        self.encode, self.head = encode, head
        self._rubric = RubricJudge()

    @property
    def usable(self) -> bool:
        """Whether the head reached its bar; when not, `judge` is the rubric."""
        return self.head.report.usable

    @property
    def name(self) -> str:
        kind = "embedded (" if self.usable else "rubric checks alone (embedded judge below its bar: "
        return f"{kind}{self.head.report.describe()})"

    def judge(self, replies: Sequence[Reply]) -> list[Part]:
        """A value in 0..1 against the reference (see the module), or the rubric's where the head is not usable."""
        return verdicts(replies, self.encode, self.head) if self.usable else self._rubric.judge(replies)
