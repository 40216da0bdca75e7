"""Online schedulers: the mixture of tasks is chosen step by step from what training shows; no transfer is measured.

One interface for four published ones, so that a study can compare them with a solved order:

    SEC   (arXiv 2505.14970): an arm's value follows mean |advantage| by TD(0); Boltzmann shares
    DUMP  (arXiv 2504.09710): windowed mean |advantage| plus an upper-confidence bonus; softmax shares
    PAC   : learning progress times |advantage|, a Gaussian posterior per task, Thompson draws per prompt
    TAC   (arXiv 2606.25178): |advantage| plus the cosine of the task's gradient with the others'; one task a step

`allocate` says how many prompts of which task the next step takes, `observe` takes in what the step showed. Draws
depend on the seed and the step alone, so the state is a few numbers per task and a resumed run allocates as an
uninterrupted one. Formulas are those of the papers' abstracts and public texts; constants that are not public are ours.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from omni_fast.curriculum.scores import Floats

Method = Literal["sec", "dump", "pac", "tac"]


class Feedback(NamedTuple):
    """What one step showed of one task.

    prompts: how many were trained on.   reward: mean reward of their samples.
    advantage: mean |advantage| over their samples (0 for groups without signal).
    sketch: random projection of the task's gradient (`gradient_sketch`), only TAC reads it.
    """

    prompts: int
    reward: float
    advantage: float
    sketch: Floats | None = None


class Scheduler:
    """Chooses the mixture of each step; keeps named lists of numbers per task in `memory`.

    Of every task: "advantage" and "reward" of its last WINDOW steps, and "count", its prompts so far.
    """

    WINDOW = 16

    def __init__(self, tasks: Sequence[str], seed: int) -> None:
        self.tasks, self.seed, self.step = tuple(tasks), seed, 0
        self.memory: dict[str, dict[str, list[float]]] = {task: {} for task in tasks}

    def allocate(self, prompts: int) -> dict[str, int]:
        """Prompts per task for the next step; they sum to `prompts`."""
        raise NotImplementedError

    def observe(self, feedback: Mapping[str, Feedback]) -> None:
        """Take in one step; tasks without prompts in it are absent."""
        self.step += 1
        for task, seen in feedback.items():
            self.keep(task, "advantage", seen.advantage, self.WINDOW)
            self.keep(task, "reward", seen.reward, self.WINDOW)
            self.keep(task, "count", self.value(task, "count") + seen.prompts)

    def state_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"step": self.step, "tasks": self.memory}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` of the same scheduler was taken."""
        self.step, self.memory = state["step"], copy.deepcopy(state["tasks"])

    def rng(self) -> np.random.Generator:
        return np.random.default_rng([self.seed, self.step])

    def value(self, task: str, name: str, default: float = 0.0) -> float:
        """The last number kept under a name."""
        kept = self.memory[task].get(name)
        return kept[-1] if kept else default

    def keep(self, task: str, name: str, value: float, window: int = 1) -> None:
        """Append a number, keeping the last `window` of them."""
        self.memory[task][name] = [*self.memory[task].get(name, []), float(value)][-window:]

    def mean(self, task: str) -> float:
        """Of the last advantages."""
        kept = self.memory[task].get("advantage")
        return sum(kept) / len(kept) if kept else 0.0

    def counted(self, counts: Iterable[int]) -> dict[str, int]:
        return {task: int(n) for task, n in zip(self.tasks, counts, strict=True)}

    def softmax(self, scores: Sequence[float] | Floats, temperature: float, prompts: int) -> dict[str, int]:
        """Prompts drawn from the softmax of scores / temperature."""
        logits = np.asarray(scores, dtype=np.float64) / temperature
        shares = np.exp(logits - logits.max())
        return self.counted(self.rng().multinomial(prompts, shares / shares.sum()))


class Sec(Scheduler):
    """Q <- alpha |A| + (1 - alpha) Q per task; shares proportional to exp(Q / temperature)."""

    ALPHA, TEMPERATURE = 0.5, 0.2

    def allocate(self, prompts: int) -> dict[str, int]:
        return self.softmax([self.value(task, "q") for task in self.tasks], self.TEMPERATURE, prompts)

    def observe(self, feedback: Mapping[str, Feedback]) -> None:
        super().observe(feedback)
        for task, seen in feedback.items():
            self.keep(task, "q", self.ALPHA * seen.advantage + (1 - self.ALPHA) * self.value(task, "q"))


class Dump(Scheduler):
    """Mean |A| over a sliding window plus sqrt(2 ln(n + 1) / (n_d + 1)), softmaxed; n counts prompts."""

    TEMPERATURE = 0.1

    def allocate(self, prompts: int) -> dict[str, int]:
        counts = np.array([self.value(task, "count") for task in self.tasks])
        bonus = np.sqrt(2 * math.log(counts.sum() + 1) / (counts + 1))
        return self.softmax([self.mean(task) for task in self.tasks] + bonus, self.TEMPERATURE, prompts)


class Pac(Scheduler):
    """u = (1 + s_prog) s_adv per task, a Gaussian posterior over u, one Thompson draw per prompt.

    s_adv: windowed mean |A|.   s_prog: the slope of the task's mean reward over the window, over the sum of all |slopes|.
    Precision of an observation: prompts of the task / (prompts of the step / K). DRIFT widens every posterior each step.
    The first `cold` steps are uniform (the authors' 50 suits runs of hundreds of steps).
    """

    DRIFT = 0.02

    def __init__(self, tasks: Sequence[str], seed: int, cold: int) -> None:
        super().__init__(tasks, seed)
        self.cold = cold

    def allocate(self, prompts: int) -> dict[str, int]:
        k = len(self.tasks)
        if self.step < self.cold:  # as equal as whole prompts allow; who gets the rest moves on with the step
            base, rest = divmod(prompts, k)
            return self.counted([base + ((place - self.step * rest) % k < rest) for place in range(k)])
        means = np.array([self.value(task, "mean") for task in self.tasks])
        spreads = np.sqrt([self.value(task, "variance", 1.0) for task in self.tasks])
        chosen = np.argmax(self.rng().normal(means, spreads, (prompts, k)), axis=1)
        return self.counted(np.bincount(chosen, minlength=k))

    def observe(self, feedback: Mapping[str, Feedback]) -> None:
        super().observe(feedback)
        slopes = {task: _slope(self.memory[task].get("reward", [])) for task in self.tasks}
        total = sum(abs(slope) for slope in slopes.values()) + 1e-8
        share = sum(seen.prompts for seen in feedback.values()) / len(self.tasks)
        for task in self.tasks:
            mean, variance = self.value(task, "mean"), self.value(task, "variance", 1.0)
            rho = feedback[task].prompts / share if task in feedback else 0.0
            utility = (1 + slopes[task] / total) * self.mean(task)
            eta = 1 / variance + rho
            self.keep(task, "mean", (mean / variance + rho * utility) / eta)
            self.keep(task, "variance", 1 / eta + self.DRIFT)


class Tac(Scheduler):
    """S = BETA L + (1 - BETA) T, plus an upper-confidence bonus, softmaxed; the whole step goes to the task drawn.

    L: |A| z-scored by its mean and spread over all tasks.   T: mean cosine between the task's running gradient direction
    and the other tasks', smoothed and min-max normalised over the tasks: the gradient-space cousin of transfer. The
    first steps go through the tasks in turn.
    """

    BETA, SMOOTHING, TEMPERATURE, BONUS = 0.5, 0.9, 0.3, 0.3

    def allocate(self, prompts: int) -> dict[str, int]:
        if self.step < len(self.tasks):
            chosen = self.tasks[self.step]
        else:
            chosen = max(self.softmax(self._scores(), self.TEMPERATURE, 1).items(), key=lambda pair: pair[1])[0]
        return {task: prompts if task == chosen else 0 for task in self.tasks}

    def observe(self, feedback: Mapping[str, Feedback]) -> None:
        super().observe(feedback)
        keep = self.SMOOTHING
        for task, seen in feedback.items():
            self.keep(task, "turns", self.value(task, "turns") + 1)
            if seen.sketch is not None and np.linalg.norm(seen.sketch) > 0:
                direction = seen.sketch / np.linalg.norm(seen.sketch)
                old = np.asarray(self.memory[task].get("direction", np.zeros_like(direction)))
                self.memory[task]["direction"] = [float(x) for x in keep * old + (1 - keep) * direction]
        for task, cosine in self._cosines().items():
            before = self.value(task, "alignment", cosine)
            self.keep(task, "alignment", keep * before + (1 - keep) * cosine)

    def _cosines(self) -> dict[str, float]:
        """Mean cosine of each task's direction with the others' known so far."""
        known = {task: np.asarray(memory["direction"]) for task, memory in self.memory.items() if "direction" in memory}
        units = {task: h / norm for task, h in known.items() if (norm := np.linalg.norm(h)) > 0}
        return {
            task: float(np.mean([unit @ other for name, other in units.items() if name != task]))
            for task, unit in units.items()
            if len(units) > 1
        }

    def _scores(self) -> Floats:
        learn, align, counts = (
            np.array([self.value(task, name) for task in self.tasks]) for name in ("advantage", "alignment", "turns")
        )
        learn = (learn - learn.mean()) / (learn.std() + 1e-8)
        align = (align - align.min()) / (np.ptp(align) or 1.0)
        bonus = self.BONUS * np.sqrt(2 * math.log(counts.sum() + 1) / (counts + 1))
        return np.asarray(self.BETA * learn + (1 - self.BETA) * align + bonus)


def build_scheduler(method: Method, tasks: Sequence[str], seed: int, *, steps: int) -> Scheduler:
    """The scheduler; PAC's uniform start is at most a fifth of the run's `steps`."""
    if method == "pac":
        return Pac(tasks, seed, cold=min(50, max(1, steps // 5)))
    return {"sec": Sec, "dump": Dump, "tac": Tac}[method](tasks, seed)


def _slope(values: Sequence[float]) -> float:
    """Least-squares slope per step; 0 for fewer than two values."""
    return float(np.polyfit(range(len(values)), values, 1)[0]) if len(values) > 1 else 0.0
