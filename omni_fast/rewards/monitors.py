"""Signs that a policy learns the reward's weakness instead of the task.

None of them proves a hack and none changes a reward: they are shown in the progress and the report, and a warning
says what was seen and where to look. Signals per task and step: drift of the length, repeated text, identical
completions within a group, the gold string stuffed into a completion, and judge against cheap checks.
Limits: words are what stands between spaces; drift is measured from the first `BASELINE` steps that a task has in a stage.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from omni_fast.rewards.qa import normalise
from omni_fast.rewards.text_checks import repeated_ngram_share, words

BASELINE = 3  # steps
MAX_DRIFT = math.log(2.0)  # warn when the mean length has doubled or halved,
MIN_DRIFT_WORDS = 8.0  # and by no less than this: a short answer that loses its preamble is what was asked for
MAX_REPEATED = 0.2
MAX_IDENTICAL_OPEN, MAX_IDENTICAL = 0.5, 0.9
MAX_STUFFED = 0.05
MAX_DISAGREEMENT = 0.3
STUFFED = 3  # mentions of the gold answer in one completion


@dataclass(frozen=True, slots=True)
class WatchedGroup:
    """One group as the monitors see it.

    rewards: totals, None for invalid samples. gold: the accepted answers as text, empty where there is none.
    checks: values 0..1 of the cheap checks for a judged task (None where one has none), else None.
    """

    completions: Sequence[str]
    rewards: Sequence[float | None]
    gold: Sequence[str] = ()
    checks: Sequence[float | None] | None = None


@dataclass(frozen=True, slots=True)
class Signals:
    """One step of one task; shares are of samples, 0..1. disagreement is None for a task that is not judged.

    words: mean words per completion. drift: log of `words` over its baseline, 0 during the baseline.
    """

    words: float
    drift: float
    repeated: float
    identical: float
    stuffed: float
    disagreement: float | None

    def record(self) -> dict[str, float | None]:
        """For metrics.jsonl."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass
class Monitor:
    """Follows every task over the steps of a stage. `baselines` is all its state, for a resume."""

    baselines: dict[str, list[float]] = field(default_factory=dict)

    def update(self, task: str, groups: Sequence[WatchedGroup]) -> tuple[Signals, dict[str, str]]:
        """The signals of a step, and for each that is out of bounds what was seen and where to look.

        Never raises for any text.
        """
        tokens = [words(text) for group in groups for text in group.completions]
        count = max(1, len(tokens))
        length = sum(len(text.split()) for group in groups for text in group.completions) / count
        baseline = self.baselines.setdefault(task, [])
        if len(baseline) < BASELINE:
            baseline.append(length)
        usual = sum(baseline) / len(baseline)
        alike = [Counter(text.strip() for text in group.completions) for group in groups]
        judged = [pair for group in groups for pair in zip(group.rewards, group.checks or (), strict=False)]
        contradicted = [_contradicts(r, c) for r, c in judged if r is not None and c is not None]
        signals = Signals(
            words=length,
            drift=math.log((length + 1.0) / (usual + 1.0)) if len(baseline) == BASELINE else 0.0,
            repeated=sum(repeated_ngram_share(row, 3) > 0.2 for row in tokens) / count,
            identical=sum(n for same in alike for n in same.values() if n > 1) / count,
            stuffed=sum(_stuffed(text, group.gold) for group in groups for text in group.completions) / count,
            disagreement=sum(contradicted) / len(contradicted) if contradicted else None,
        )
        rewards = [value for group in groups for value in group.rewards if value is not None]
        return signals, _signs(signals, usual, sum(rewards) / len(rewards) if rewards else None)


def _contradicts(reward: float, check: float) -> bool:
    """The judge pays what the checks refuse, or refuses what passes every check."""
    return (reward >= 0.75 and check < 0.5) or (reward <= 0.25 and check > 0.95)


def _stuffed(text: str, gold: Sequence[str]) -> bool:
    haystack, *needles = (f" {normalise(one).replace(' ', '  ')} " for one in (text[:2000], *gold))
    return any(needle.strip() and haystack.count(needle) >= STUFFED for needle in needles)


_SENTENCES = {
    "drift": "completions have {way} to {words:.0f} words; compare samples early and late, and look whether the reward "
    "pays length",
    "repeated": "{repeated:.0%} of the completions repeat themselves; lower the learning rate or add a check on repetition",
    "identical": "{identical:.0%} of the completions in a group are the same; raise the temperature or the entropy bonus",
    "stuffed": "{stuffed:.0%} of the completions name the gold answer too often; check that the verifier grades one "
    "extracted answer",
    "disagreement": "judge and cheap checks contradict each other on {disagreement:.0%} of the completions; read some of "
    "them before trusting the reward",
}


def _signs(signals: Signals, usual: float, reward: float | None) -> dict[str, str]:
    judged = signals.disagreement is not None
    out = {
        "drift": abs(signals.drift) > MAX_DRIFT and abs(signals.words - usual) >= MIN_DRIFT_WORDS,
        "repeated": signals.repeated > MAX_REPEATED,
        "identical": signals.identical > (MAX_IDENTICAL_OPEN if judged else MAX_IDENTICAL)
        and (judged or (reward or 0.0) < 0.2),
        "stuffed": signals.stuffed > MAX_STUFFED,
        "disagreement": (signals.disagreement or 0.0) > MAX_DISAGREEMENT,
    }
    seen = signals.record() | {"way": "grown" if signals.drift > 0 else "shrunk"}
    return {name: _SENTENCES[name].format(**seen) for name in out if out[name]}
