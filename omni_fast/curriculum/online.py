"""Online schedulers: the mixture of tasks is chosen step by step from what training shows; no transfer is measured.

One interface for four published ones, so that a study can compare them with a solved order:

    SEC   (arXiv 2505.14970): an arm's value follows mean |advantage| by TD(0); Boltzmann shares
    DUMP  (arXiv 2504.09710): windowed mean |advantage| plus an upper-confidence bonus; softmax shares
    PAC   : learning progress times |advantage|, a Gaussian posterior per task, Thompson draws per prompt
    TAC   (arXiv 2606.25178): |advantage| plus the cosine of the task's gradient with the others'; one task a step

`allocate` says how many prompts of which task the next step takes, `observe` takes in what the step showed. Draws
depend on the seed and the step alone, so the state is a few numbers per task and a resumed run allocates as an
uninterrupted one. Formulas are those of the papers' abstracts and public texts; where a constant is not public, the
default is ours and is a parameter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypedDict

import numpy as np

from omni_fast.curriculum.scores import Floats
from omni_fast.errors import UserError

Method = Literal["sec", "dump", "pac", "tac"]


@dataclass(frozen=True, slots=True)
class Feedback:
    """What one step showed of one task.

    prompts: how many were trained on.   reward: mean reward of their samples.
    advantage: mean |advantage| over their samples (0 for groups without signal).
    sketch: random projection of the task's gradient (`gradient_sketch`), only TAC reads it.
    """

    prompts: int
    reward: float
    advantage: float
    sketch: Floats | None = None


class SchedulerState(TypedDict):
    """JSON-ready. tasks: per task, named lists of numbers."""

    method: str
    step: int
    tasks: dict[str, dict[str, list[float]]]


class Scheduler(Protocol):
    """Chooses the mixture of each step."""

    def allocate(self, prompts: int) -> dict[str, int]:
        """Prompts per task for the next step; they sum to `prompts`."""
        ...

    def observe(self, feedback: Mapping[str, Feedback]) -> None:
        """Take in one step; tasks without prompts in it are absent."""
        ...

    def state_dict(self) -> SchedulerState: ...

    def load_state_dict(self, state: SchedulerState) -> None: ...


class _Bandit:
    """Steps, seeds and state shared by the schedulers; each keeps named lists of numbers per task in `memory`."""

    method: Method

    def __init__(self, tasks: Sequence[str], seed: int) -> None:
        self.tasks = tuple(tasks)
        self.seed = seed
        self.step = 0
        self.memory: dict[str, dict[str, list[float]]] = {task: {} for task in tasks}

    def rng(self) -> np.random.Generator:
        return np.random.default_rng([self.seed, self.step])

    def value(self, task: str, name: str, default: float = 0.0) -> float:
        """The last number kept under a name."""
        kept = self.memory[task].get(name)
        return kept[-1] if kept else default

    def keep(self, task: str, name: str, value: float, window: int = 1) -> None:
        """Append a number, keeping the last `window` of them."""
        kept = self.memory[task].setdefault(name, [])
        kept.append(float(value))
        del kept[:-window]

    def mean(self, task: str, name: str) -> float:
        kept = self.memory[task].get(name)
        return sum(kept) / len(kept) if kept else 0.0

    def state_dict(self) -> SchedulerState:
        tasks = {task: {name: list(kept) for name, kept in memory.items()} for task, memory in self.memory.items()}
        return {"method": self.method, "step": self.step, "tasks": tasks}

    def load_state_dict(self, state: SchedulerState) -> None:
        if state["method"] != self.method or set(state["tasks"]) != set(self.tasks):
            raise UserError(
                f"The saved scheduler is {state['method']} over {', '.join(state['tasks'])}, this run's is"
                f" {self.method} over {', '.join(self.tasks)}; resume with the configuration the run was started with."
            )
        self.step = state["step"]
        self.memory = {t: {name: list(kept) for name, kept in memory.items()} for t, memory in state["tasks"].items()}

    def _spread(self, scores: Sequence[float], temperature: float, prompts: int) -> dict[str, int]:
        """Prompts drawn from the softmax of scores / temperature."""
        logits = np.asarray(scores, dtype=np.float64) / temperature
        shares = np.exp(logits - logits.max())
        counts = self.rng().multinomial(prompts, shares / shares.sum())
        return {task: int(n) for task, n in zip(self.tasks, counts, strict=True)}


class Sec(_Bandit):
    """Q <- alpha |A| + (1 - alpha) Q per task; shares proportional to exp(Q / temperature)."""

    method: Method = "sec"

    def __init__(self, tasks: Sequence[str], seed: int, *, alpha: float = 0.5, temperature: float = 0.2) -> None:
        super().__init__(tasks, seed)
        self.alpha, self.temperature = alpha, temperature

    def allocate(self, prompts: int) -> dict[str, int]:
        return self._spread([self.value(task, "q") for task in self.tasks], self.temperature, prompts)

    def observe(self, feedback: Mapping[str, Feedback]) -> None:
        for task, seen in feedback.items():
            self.keep(task, "q", self.alpha * seen.advantage + (1 - self.alpha) * self.value(task, "q"))
        self.step += 1


class Dump(_Bandit):
    """Mean |A| over a sliding window plus sqrt(2 ln(n + 1) / (n_d + 1)), softmaxed; n counts prompts."""

    method: Method = "dump"

    def __init__(self, tasks: Sequence[str], seed: int, *, window: int = 16, temperature: float = 0.1) -> None:
        super().__init__(tasks, seed)
        self.window, self.temperature = window, temperature

    def allocate(self, prompts: int) -> dict[str, int]:
        counts = [self.value(task, "count") for task in self.tasks]
        log_total = math.log(sum(counts) + 1)
        bonus = [math.sqrt(2 * log_total / (count + 1)) for count in counts]
        scores = [self.mean(task, "advantage") + extra for task, extra in zip(self.tasks, bonus, strict=True)]
        return self._spread(scores, self.temperature, prompts)

    def observe(self, feedback: Mapping[str, Feedback]) -> None:
        for task, seen in feedback.items():
            self.keep(task, "advantage", seen.advantage, self.window)
            self.keep(task, "count", self.value(task, "count") + seen.prompts)
        self.step += 1


class Pac(_Bandit):
    """u = (1 + s_prog) s_adv per task, a Gaussian posterior over u, one Thompson draw per prompt.

    s_adv: windowed mean |A|.   s_prog: the slope of the task's mean reward over the window, over the sum of all
    |slopes|.
    Precision of an observation: prompts of the task / (prompts of the step / K). `drift` widens every posterior each
    step. The first `cold` steps are uniform (the authors' 50 suits runs of hundreds of steps; shorten it for short
    ones).
    """

    method: Method = "pac"

    def __init__(
        self, tasks: Sequence[str], seed: int, *, window: int = 16, cold: int = 50, drift: float = 0.02
    ) -> None:
        super().__init__(tasks, seed)
        self.window, self.cold, self.drift = window, cold, drift

    def allocate(self, prompts: int) -> dict[str, int]:
        if self.step < self.cold:
            return _even(self.tasks, prompts, self.step)
        means = np.array([self.value(task, "mean") for task in self.tasks])
        spreads = np.sqrt([self.value(task, "variance", 1.0) for task in self.tasks])
        chosen = np.argmax(self.rng().normal(means, spreads, (prompts, len(self.tasks))), axis=1)
        counts = np.bincount(chosen, minlength=len(self.tasks))
        return {task: int(n) for task, n in zip(self.tasks, counts, strict=True)}

    def observe(self, feedback: Mapping[str, Feedback]) -> None:
        for task, seen in feedback.items():
            self.keep(task, "reward", seen.reward, self.window)
            self.keep(task, "advantage", seen.advantage, self.window)
        slopes = {task: _slope(self.memory[task].get("reward", [])) for task in self.tasks}
        total = sum(abs(slope) for slope in slopes.values()) + 1e-8
        share = sum(seen.prompts for seen in feedback.values()) / len(self.tasks)
        for task in self.tasks:
            mean, variance = self.value(task, "mean"), self.value(task, "variance", 1.0)
            seen_prompts = feedback[task].prompts if task in feedback else 0
            rho = seen_prompts / share if share else 0.0
            utility = (1 + slopes[task] / total) * self.mean(task, "advantage")
            eta = 1 / variance + rho
            self.keep(task, "mean", (mean / variance + rho * utility) / eta)
            self.keep(task, "variance", 1 / eta + self.drift)
        self.step += 1


class Tac(_Bandit):
    """S = beta L + (1 - beta) T, plus an upper-confidence bonus, softmaxed; the whole step goes to the task drawn.

    L: |A| z-scored by its running mean and spread over all tasks.   T: mean cosine between the task's running gradient
    direction and the other tasks', smoothed and min-max normalised over the tasks: the gradient-space cousin of
    transfer. The first `rounds` passes go through the tasks in turn.
    """

    method: Method = "tac"

    def __init__(
        self,
        tasks: Sequence[str],
        seed: int,
        *,
        beta: float = 0.5,
        smoothing: float = 0.9,
        temperature: float = 0.3,
        bonus: float = 0.3,
        rounds: int = 1,
    ) -> None:
        super().__init__(tasks, seed)
        self.beta, self.smoothing, self.temperature = beta, smoothing, temperature
        self.bonus, self.rounds = bonus, rounds

    def allocate(self, prompts: int) -> dict[str, int]:
        if self.step < self.rounds * len(self.tasks):
            chosen = self.tasks[self.step % len(self.tasks)]
        else:
            chosen = max(self._spread(self._scores(), self.temperature, 1).items(), key=lambda pair: pair[1])[0]
        return {task: prompts if task == chosen else 0 for task in self.tasks}

    def observe(self, feedback: Mapping[str, Feedback]) -> None:
        keep = self.smoothing
        for task, seen in feedback.items():
            self.keep(task, "advantage", seen.advantage)
            self.keep(task, "count", self.value(task, "count") + 1)
            if seen.sketch is not None and np.linalg.norm(seen.sketch) > 0:
                direction = seen.sketch / np.linalg.norm(seen.sketch)
                old = np.asarray(self.memory[task].get("direction", np.zeros_like(direction)))
                self.memory[task]["direction"] = [float(x) for x in keep * old + (1 - keep) * direction]
        cosines = self._cosines()
        for task, cosine in cosines.items():
            before = self.value(task, "alignment", cosine)
            self.keep(task, "alignment", keep * before + (1 - keep) * cosine)
        self.step += 1

    def _cosines(self) -> dict[str, float]:
        """Mean cosine of each task's direction with the others' known so far."""
        units = {}
        for task in self.tasks:
            h = np.asarray(self.memory[task].get("direction", []))
            if h.size and np.linalg.norm(h) > 0:
                units[task] = h / np.linalg.norm(h)
        return {
            task: float(np.mean([unit @ other for name, other in units.items() if name != task]))
            for task, unit in units.items()
            if len(units) > 1
        }

    def _scores(self) -> list[float]:
        learn = np.array([self.value(task, "advantage") for task in self.tasks])
        learn = (learn - learn.mean()) / (learn.std() + 1e-8)
        align = np.array([self.value(task, "alignment") for task in self.tasks])
        span = align.max() - align.min()
        align = (align - align.min()) / span if span > 0 else np.zeros_like(align)
        counts = np.array([self.value(task, "count") for task in self.tasks])
        bonus = self.bonus * np.sqrt(2 * math.log(counts.sum() + 1) / (counts + 1))
        return [float(x) for x in self.beta * learn + (1 - self.beta) * align + bonus]


def build_scheduler(method: Method, tasks: Sequence[str], seed: int, *, steps: int) -> Scheduler:
    """The scheduler with its defaults; PAC's uniform start is at most a fifth of the run's `steps`."""
    if method == "pac":
        return Pac(tasks, seed, cold=min(50, max(1, steps // 5)))
    kinds: dict[str, type[Sec | Dump | Tac]] = {"sec": Sec, "dump": Dump, "tac": Tac}
    return kinds[method](tasks, seed)


def _even(tasks: Sequence[str], prompts: int, step: int) -> dict[str, int]:
    """As equal as whole prompts allow; who gets the rest moves on with the step."""
    base, rest = divmod(prompts, len(tasks))
    extra = {tasks[(step * rest + k) % len(tasks)] for k in range(rest)}
    return {task: base + (task in extra) for task in tasks}


def _slope(values: Sequence[float]) -> float:
    """Least-squares slope per step; 0 for fewer than two values."""
    if len(values) < 2:
        return 0.0
    x = np.arange(len(values)) - (len(values) - 1) / 2
    return float(x @ np.asarray(values) / (x @ x))
