"""How much of a slow judge and of a straggling server is hidden when rollouts run ahead, and how do rollouts grow with servers?

    python benchmarks/bench_overlap.py [--rounds 3] [--output benchmarks/results/overlap.json]

Overlap: whole training steps of `omni_fast.train` behind three servers with `rollout.max_staleness` 0, 1 and 2. Everything
that takes time is simulated, so that nothing but the order of the work is measured: the servers sleep for their tokens
(tests/rollout/timed_sglang.py; lengths with a long tail), the judge sleeps for each group, the update sleeps before the real
update of a small model. Twice: a judge that needs longer than all else, and a server at a third of the others' speed. The
limit is what no order can beat: the most that one of servers, judge and update has to do in a step. All steps of a run count,
the first ones too, for which nothing was under way.
Servers: the same groups on 1, 2 and 4 servers; the limit is all their seconds over all places.
Contenders take turns in every round; medians over rounds, with the spread.
"""

from __future__ import annotations

import io
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from unittest.mock import patch

import scoreboard
import torch
from rich.console import Console
from transformers import PreTrainedModel

from omni_fast import train
from omni_fast.policy.pack import Trajectory
from omni_fast.policy.update import Policy
from omni_fast.progress import Progress
from omni_fast.rollout.engine import Prompt, Sampling
from omni_fast.rollout.fleet import Fleet
from omni_fast.rollout.sglang import SGLangEngine

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "rollout"))
from fake_sglang import serving
from timed_sglang import Letters, NamedWeights, config_for, nameless, small_model, tailed, timed

BOUNDS, SERVERS = (0, 1, 2), (1, 2, 4)
STEPS, PROMPTS, N, TOKENS = 12, 12, 4, 64
TOKEN_S, PLACES, UPDATE_S = 0.01, 4, 0.4
SCENES = {"slow judge": ((1, 1, 1), 0.1), "straggling server": ((1, 1, 3), 0.0)}  # how slow servers are; s of a group
GROUPS, IN_FLIGHT, FLEET_TOKEN_S = 256, 8, 0.01


def steps(scene: str, bound: int, model: PreTrainedModel, place: Path) -> dict[str, float]:
    """One run; means over its steps."""
    slower, judge_s = SCENES[scene]
    servers = [timed(model, token_s=TOKEN_S * factor, length=tailed) for factor in slower]
    plain = Policy.update

    def update(policy: Policy, batch: Sequence[Trajectory]) -> dict[str, float]:
        time.sleep(UPDATE_S)
        return plain(policy, batch)

    with tempfile.TemporaryDirectory() as name, serving(*servers), Progress(Console(file=io.StringIO())) as progress:
        folder = Path(name)
        config = config_for(
            folder, place, [server.url for server in servers], bound, engine__in_flight=PLACES,
            curriculum__steps_per_stage=STEPS, rollout__prompts_per_step=PROMPTS, rollout__samples_per_prompt=N,
            tasks__letters__max_new_tokens=TOKENS, checkpoint__every_steps=1000, engine__sync="tensor",
            engine__request_timeout_s=60, evaluation__select_items=1, evaluation__test_items=1,
        )  # fmt: skip
        with patch.object(Policy, "update", update), patch.object(Letters, "judge_s", judge_s):
            train.train(config, folder / "run", progress)
        lines = (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if row["event"] == "step"]
    seconds = {part: statistics.mean(row["seconds"][part] for row in rows) for part in rows[0]["seconds"]}
    waited = seconds["generate"] + seconds["reward"] + seconds["sync"]
    found = {f"{part} s": value for part, value in seconds.items()} | {"waited, share": waited / seconds["total"]}
    for key in ("staleness_mean", "mixed_versions"):
        found[key] = statistics.mean(row["update"][key] for row in rows)
    found["staleness_max"] = max(row["update"]["staleness_max"] for row in rows)
    found["sync paused ms"] = 1e3 * statistics.mean(row["update"]["seconds/sync_paused"] for row in rows)
    assert found["staleness_max"] <= bound
    asked = [body for server in servers for body in server.paths("/generate")]
    lengths = [tailed(body["input_ids"], TOKENS) for body in asked if body.get("sampling_params", {}).get("n") == N]
    work = statistics.mean(lengths) * PROMPTS * TOKEN_S / PLACES / sum(1 / factor for factor in slower)
    return found | {"limit s": max(work, PROMPTS * judge_s, seconds["update"])}


def rollouts(count: int) -> float:
    """Samples a second from so many servers."""
    servers = [nameless(token_s=FLEET_TOKEN_S, length=tailed) for _ in range(count)]
    with serving(*servers):
        fleet = Fleet([server.url for server in servers], in_flight=IN_FLIGHT)
        engine = SGLangEngine(fleet, NamedWeights(fleet))
        started = time.perf_counter()
        found = engine.generate(groups(), N, Sampling(max_new_tokens=TOKENS))
        took = time.perf_counter() - started
        engine.close()
    assert len(found) == GROUPS
    return GROUPS * N / took


def groups() -> list[Prompt]:
    return [Prompt([1, 2, 3 + place], place) for place in range(GROUPS)]


def main() -> None:
    options, figures = scoreboard.options(__doc__, rounds=3), scoreboard.Figures()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        model = small_model(Path(folder))
        for _ in range(options.rounds):
            for scene in SCENES:
                for bound in BOUNDS:
                    for key, value in steps(scene, bound, model, Path(folder)).items():
                        figures.note(f"{scene}, max_staleness {bound}: {key}", value)
            for count in SERVERS:
                figures.note(f"{count} servers: samples/s", rollouts(count))

    middle = {name: spread["median"] for name, spread in figures.spreads().items()}
    work = sum(tailed(list(prompt.tokens), TOKENS) for prompt in groups()) * FLEET_TOKEN_S
    gain, share = {}, {}  # over the first of its kind, of the limit
    for count in SERVERS:
        name = f"{count} servers: samples/s"
        gain[name] = middle[name] / middle[f"{SERVERS[0]} servers: samples/s"]
        share[name] = middle[name] * work / (GROUPS * N * count * IN_FLIGHT)
    for scene in SCENES:
        for bound in BOUNDS:
            name = f"{scene}, max_staleness {bound}: total s"
            gain[name] = middle[f"{scene}, max_staleness {BOUNDS[0]}: total s"] / middle[name]
            share[name] = middle[f"{scene}, max_staleness {bound}: limit s"] / middle[name]
    figures.show({name: f"{gain[name]:.2f}x the first, {share[name]:.0%} of the limit" for name in gain})
    simulated = {
        "prompts_per_step": PROMPTS, "samples_per_prompt": N, "max_new_tokens": TOKENS, "steps": STEPS,
        "token_s": TOKEN_S, "places_of_a_server": PLACES, "update_s": UPDATE_S,
        "scenes": {name: {"slower": slower, "judge_s": judge_s} for name, (slower, judge_s) in SCENES.items()},
        "fleet": {"groups": GROUPS, "places_of_a_server": IN_FLIGHT, "token_s": FLEET_TOKEN_S},
    }  # fmt: skip
    figures.save(options.output, ("torch",), simulated=simulated, ratio_to_the_first=gain, share_of_the_limit=share)


if __name__ == "__main__":
    main()
