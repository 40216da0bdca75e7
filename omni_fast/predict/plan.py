"""How many GPUs should train and how many generate, how long a step then takes, what limits it, and what a study costs."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from omni_fast.errors import UserError
from omni_fast.predict.machines import CPU, CPU_SYNC_BYTES_S, DENSE, EXPERTS, MACHINES, SYNC_BYTES_S, Efficiency, Shape
from omni_fast.predict.simulate import Simulation, Timing
from omni_fast.predict.step import NETWORK_SHARE, USABLE, WEIGHT, Server, Trainer, Work

STEPS = 8  # that count; fewer of large steps, whose many samples differ little from step to step, but at least two
COUNTED_SAMPLES = 80_000
MOST_SAMPLES = 400_000  # simulated for one plan: a second


@dataclass(frozen=True)
class Fleet:
    """What there is. machine: of `MACHINES`. server_gpus: of one replica, 0: the fewest that do. sync_share: of the weights'
    bytes that travel at a sync, at sync_bytes_s (0: as fast as published, or measured on the CPU); servers stand still meanwhile. hours_between_failures: of one replica, 0: none."""

    shape: Shape
    machine: str
    gpus: int
    server_gpus: int = 0
    staleness: int = 0
    sync_bytes_s: float = 0.0
    sync_share: float = 1.0
    hours_between_failures: float = 0.0
    experts_stay: bool = False

    @property
    def share(self) -> Efficiency:
        return CPU if self.machine == "cpu" else EXPERTS if self.shape.experts else DENSE

    @property
    def trainer(self) -> Trainer:
        """On one GPU."""
        return Trainer(self.shape, MACHINES[self.machine], self.share, 1, self.experts_stay)

    @property
    def server(self) -> Server:
        """Of the GPUs asked for, or the smallest (a power of two) that has a third of its memory or more for the cache."""
        machine, gpus = MACHINES[self.machine], self.server_gpus or 1
        while not self.server_gpus and WEIGHT * self.shape.parameters > USABLE * gpus * machine.memory * 2 / 3:
            gpus *= 2
        return Server(self.shape, machine, self.share, gpus)


@dataclass(frozen=True)
class Plan:
    """One way to use a fleet. trainer_gpus == the fleet's: its GPUs generate and train in turns. Memory in bytes of a GPU."""

    trainer_gpus: int
    servers: int
    server_gpus: int
    update: dict[str, float]
    timing: Timing
    trainer_memory: float
    limit: str


def plan(fleet: Fleet, work: Work, trainer_gpus: int) -> Plan:
    """The fleet with so many GPUs training; all of them: in turns with generating. UserError where it cannot fit."""
    machine, server = MACHINES[fleet.machine], fleet.server
    turns = trainer_gpus == fleet.gpus
    trainer = replace(fleet.trainer, gpus=trainer_gpus)
    servers = (fleet.gpus if turns else fleet.gpus - trainer_gpus) // server.gpus
    if server.slots(work) < 1:
        weights = f"{WEIGHT * fleet.shape.parameters / 1e9:.0f} GB of weights"
        raise UserError(f"a server of {server.gpus} GPUs has no room for a sample beside {weights}: more --server-gpus")
    if trainer.memory > USABLE * machine.memory:
        fewest = smallest_trainer(trainer)
        needed = f"{trainer.memory / 1e9:.0f} of {USABLE * machine.memory / 1e9:.0f} GB on each of {trainer_gpus} GPUs"
        remedy = f"{fewest} GPUs are the fewest" if fewest else "a gathered layer alone is too large (--experts-stay)"
        raise UserError(f"training needs {needed}: {remedy}")
    steps = max(2, min(STEPS, COUNTED_SAMPLES // work.batch))
    if (samples := work.batch * (steps + 3 * fleet.staleness + 2)) > MOST_SAMPLES:
        most = f"{samples:,} samples to simulate, {MOST_SAMPLES:,} are the most"
        raise UserError(f"{most}: give less of --prompts, --samples or --staleness")
    if servers < 1:
        raise UserError(
            f"--gpus {fleet.gpus} leaves no room for a server of {server.gpus} beside the trainer: give more"
        )
    update = trainer.update_s(work)
    # In turns every server collects its own part of the weights, all at once.
    rate = fleet.sync_bytes_s or (CPU_SYNC_BYTES_S if fleet.machine == "cpu" else SYNC_BYTES_S)
    if turns and fleet.machine != "cpu":
        rate = server.gpus * NETWORK_SHARE * machine.network
    sync = WEIGHT * fleet.shape.parameters * fleet.sync_share / rate
    failures = 1 / (3600 * fleet.hours_between_failures) if fleet.hours_between_failures else 0.0
    staleness = 0 if turns else fleet.staleness
    timing = Simulation(server, servers, work, sum(update.values()), sync, staleness, failures, steps).run()
    limit = _limit(server, work, update, timing, (staleness + 1) * work.batch / servers)
    return Plan(trainer_gpus, servers, server.gpus, update, timing, trainer.memory, limit)


def smallest_trainer(trainer: Trainer) -> int:
    """GPUs of the smallest such trainer whose state and activations fit; 0: none of up to 65,536."""
    room, sizes = USABLE * trainer.machine.memory, range(1, 65_537)
    place = bisect_left(sizes, True, key=lambda gpus: replace(trainer, gpus=gpus).memory <= room)
    return sizes[place] if place < len(sizes) else 0


def splits(fleet: Fleet, work: Work) -> list[Plan]:
    """About a dozen ways to split the GPUs between training and generating, and that of taking turns, last."""
    first, width = smallest_trainer(fleet.trainer) or fleet.gpus, fleet.server.gpus
    stride = max(width, fleet.gpus // 16 // width * width)
    counts = [count for count in range(stride, fleet.gpus, stride) if count >= first and fleet.gpus - count >= width]
    return [plan(fleet, work, count) for count in [*counts, fleet.gpus]]


def study_steps(tasks: int, steps_per_stage: int, seeds: int) -> int:
    """Of a study that measures transfer and compares curriculum, reversed, random and joint: per seed one run per task, three
    orders (each begins with a run that exists), and joint training as long as an order."""
    return seeds * steps_per_stage * (tasks + 3 * (tasks - 1) + tasks)


def _limit(server: Server, work: Work, update: dict[str, float], timing: Timing, in_flight: float) -> str:
    """The largest part of the step, and of that the largest reason. in_flight: samples of a server that staleness allows."""
    part = max(("waiting", "update", "sync"), key=lambda name: float(getattr(timing, name)))
    if part == "sync":
        return "weight sync"
    if part == "update":
        told = {"compute": "arithmetic of the update", "gather": "network of the trainer", "optimiser": "optimiser"}
        return told[max(update, key=lambda name: update[name])]
    if timing.idle > 0.3:
        return "the longest samples"
    rows = server.slots(work)
    if in_flight < rows:
        return "samples in flight (staleness)"
    context = rows * (work.prompt_tokens / (work.samples if work.shared else 1) + work.new_tokens / 2)
    free = replace(server, share=replace(server.share, decode_bytes=float("inf")))
    bandwidth = 1 - free.decode_s(rows, context) / server.decode_s(rows, context)
    return "memory bandwidth of the servers" if bandwidth > 0.5 else "arithmetic of the servers"


def draw(plans: Mapping[str, Sequence[Plan]], title: str, path: Path) -> None:
    """Seconds a step against the trainer's GPUs, a line for each series; what takes turns is a dashed line."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, found in plans.items():
        *apart, turns = found
        points = [(one.trainer_gpus, one.timing.step) for one in apart]
        for best in sorted(points, key=lambda point: point[1])[:1]:  # none where only turns fit
            (line,) = axes.plot(*zip(*points, strict=True), marker="o", label=name)
            axes.annotate(
                f"{best[1]:.0f} s", best, xytext=(0, 7), textcoords="offset points", ha="center", color=line.get_color()
            )
    axes.axhline(turns.timing.step, linestyle="--", color="grey", label="all GPUs in turns")
    axes.set(xlabel="GPUs that train", ylabel="seconds a step (predicted)", title=title, ylim=(0, None))
    axes.legend()
    try:
        figure.savefig(path, dpi=130, format="png")
    except OSError as error:
        raise UserError(f"--plot {path} cannot be written ({error.strerror}): name another file") from error
