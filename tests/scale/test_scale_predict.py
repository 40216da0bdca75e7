"""Predictions: exact where a closed form exists, sane where none does, and as far from measurements as docs/scale.md says."""

from __future__ import annotations

import json
import runpy
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from omni_fast.cli import app
from omni_fast.errors import UserError
from omni_fast.predict.machines import CPU, DENSE, MACHINES, SHAPES, read_shape
from omni_fast.predict.plan import Fleet, plan, smallest_trainer, splits, study_steps
from omni_fast.predict.simulate import Simulation, Timing, lengths
from omni_fast.predict.step import STATE, USABLE, Server, Trainer, Work

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
RESULTS = BENCHMARKS / "results"
fitting = SimpleNamespace(**runpy.run_path(str(BENCHMARKS / "predict_fit.py")))
H100, SMALL = MACHINES["h100"], SHAPES["qwen2.5-0.5b"]
SERVER = Server(SMALL, H100, DENSE, 1)
WORK = Work(prompts=8, samples=4, prompt_tokens=64, new_tokens=100, max_new_tokens=400)


def simulate(servers: int, work: Work, update_s: float, sync_s: float, **more: float) -> Timing:
    return Simulation(SERVER, servers, work, update_s, sync_s, **more).run()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "parameters", "active"),
    [
        ("smollm2-135m", 134.5e6, 134.5e6), ("qwen2.5-0.5b", 494e6, 494e6), ("qwen2.5-7b", 7.62e9, 7.62e9),
        ("qwen3-30b-a3b", 30.5e9, 3.3e9), ("qwen3-235b-a22b", 235e9, 22e9), ("deepseek-v3", 671e9, 37e9),
        ("kimi-k2", 1.03e12, 32e9),
    ],
)  # fmt: skip
def test_shapes_have_the_published_parameters(name: str, parameters: float, active: float) -> None:
    shape = SHAPES[name]
    assert shape.parameters == pytest.approx(parameters, rel=0.01)
    assert shape.active_body + shape.head * (1 if shape.tied else 2) == pytest.approx(active, rel=0.04)
    assert shape.active_body + shape.head <= shape.read_weights(1) * 1.0001
    assert shape.read_weights(1e6) <= shape.parameters


def test_a_shape_is_read_from_a_config(tmp_path: Path) -> None:
    raw = {
        "hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
        "intermediate_size": 6144, "vocab_size": 151936, "tie_word_embeddings": False, "num_experts": 128,
        "num_experts_per_tok": 8, "moe_intermediate_size": 768,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert read_shape(str(tmp_path)) == SHAPES["qwen3-30b-a3b"]
    for bad in ({"hidden_size": 1}, [], "x"):
        (tmp_path / "config.json").write_text(json.dumps(bad))
        with pytest.raises(UserError, match="config of a decoder"):
            read_shape(str(tmp_path))
    with pytest.raises(UserError, match=r"qwen2\.5-7b"):
        read_shape("no-such-model")


def test_equal_lengths_have_a_closed_form() -> None:
    work = replace(WORK, spread=0.0)
    rows, tokens = work.batch, work.new_tokens
    context = rows * (work.prompt_tokens / work.samples + tokens / 2)
    generate = tokens * SERVER.decode_s(rows, context) + SERVER.prefill_s(rows * 16, work.prompt_tokens)
    found = simulate(1, work, 3.0, 0.5)
    assert found.generate == pytest.approx(generate, rel=0.02)
    assert found.step == pytest.approx(generate + 3.5, rel=0.02)
    assert found.waiting == pytest.approx(generate, rel=0.02)
    assert found.staleness == 0.0 and found.tail == pytest.approx(0.0, abs=1e-9)


@settings(deadline=None, max_examples=12)
@given(
    servers=st.integers(1, 6), staleness=st.integers(0, 3), update=st.floats(0.0, 20.0), sync=st.floats(0.0, 5.0),
    spread=st.floats(0.0, 1.5), seed=st.integers(0, 5), fails=st.booleans(),
)  # fmt: skip
def test_laws_of_the_fleet(
    servers: int, staleness: int, update: float, sync: float, spread: float, seed: int, fails: bool
) -> None:
    work = replace(WORK, spread=spread)
    rate = 1 / 20 if fails else 0.0
    found = simulate(servers, work, update, sync, staleness=staleness, failures_per_s=rate, seed=seed)
    again = simulate(servers, work, update, sync, staleness=staleness, failures_per_s=rate, seed=seed)
    assert found == again
    assert found.step >= update + sync - 1e-6  # one trainer does both
    assert found.step == pytest.approx(found.waiting + update + sync, rel=1e-6)
    assert -1e-6 <= found.idle <= 1.0
    assert 0.0 <= found.staleness <= staleness + 1e-9
    assert fails or found.lost_tokens == 0.0


def test_twice_the_servers_generate_twice_as_much() -> None:
    work = Work(64, 8, 64, 200, 220, spread=0.05)  # more samples than slots, no tail
    one, two = (simulate(servers, work, 0.0, 0.0, staleness=1).step for servers in (1, 2))
    assert one / two == pytest.approx(2.0, rel=0.1)


def test_the_pace_of_a_server_is_not_computed_for_each_sample() -> None:
    """5,000 prompts on 64 GPUs took more than a minute."""
    asked = []

    class Counting(Server):
        def decode_s(self, rows: float, context: float) -> float:
            asked.append(rows)
            return super().decode_s(rows, context)

    Simulation(Counting(SMALL, H100, DENSE, 1), 2, replace(WORK, prompts=500), 1.0, 0.1).run()
    assert len(asked) <= 260  # one for each number of rows


def test_few_steps_of_many_samples_are_as_good_as_many() -> None:
    fleet, work = Fleet(SMALL, "h100", 8), Work(2500, 8, 64, 100, 400)
    found = plan(fleet, work, 4)
    server = fleet.server
    sync = found.timing.sync
    longer = Simulation(server, 4, work, sum(found.update.values()), sync, steps=8).run()
    assert found.timing.step == pytest.approx(longer.step, rel=0.01)


def test_staleness_hides_generation_behind_the_update() -> None:
    generate = simulate(1, WORK, 0.0, 0.0).step
    strict, loose = (simulate(1, WORK, generate, 0.0, staleness=n, steps=12).step for n in (0, 1))
    assert strict == pytest.approx(2 * generate, rel=0.05)
    assert generate <= loose < 0.75 * strict


def test_failures_cost_time_and_lose_no_sample() -> None:
    sound = simulate(3, WORK, 1.0, 0.1)
    broken = simulate(3, WORK, 1.0, 0.1, failures_per_s=1 / 5)
    assert broken.lost_tokens > 0 and broken.step > sound.step


@settings(deadline=None, max_examples=20)
@given(st.floats(10, 900), st.floats(0.0, 1.5))
def test_lengths_have_the_mean_asked_for(mean: float, spread: float) -> None:
    drawn, _ = lengths(replace(WORK, new_tokens=mean, max_new_tokens=1000, spread=spread), 4000, 0)
    assert max(drawn) <= 1000 and min(drawn) >= 1
    assert fmean(drawn) == pytest.approx(mean, rel=0.1)


def test_the_state_of_a_sharded_trainer_adds_up() -> None:
    shape = SHAPES["qwen2.5-7b"]
    four, eight = (Trainer(shape, H100, DENSE, gpus) for gpus in (8, 16))
    assert four.microbatch == eight.microbatch
    assert four.memory - eight.memory == pytest.approx(STATE * shape.parameters / 16)
    assert smallest_trainer(four) == 3  # 137 GB of state
    assert Trainer(shape, H100, DENSE, 2).memory > USABLE * H100.memory >= Trainer(shape, H100, DENSE, 3).memory
    assert not smallest_trainer(Trainer(SHAPES["kimi-k2"], H100, DENSE, 1))  # one layer has 17 G weights
    assert smallest_trainer(Trainer(SHAPES["kimi-k2"], H100, DENSE, 1, experts_stay=True))


def test_the_shares_of_the_cpu_are_the_fit_of_what_is_committed() -> None:
    cases = fitting.read(RESULTS)
    share, scoring = fitting.fit(cases, SHAPES["smollm2-135m"], MACHINES["cpu"])
    assert replace(share, source=CPU.source) == CPU
    assert 0.3 < scoring < 3
    found = fitting.errors(cases, SHAPES["smollm2-135m"], MACHINES["cpu"])
    assert len(found) >= 6
    for name, (with_it, without_it) in found.items():
        assert abs(with_it) <= 0.10, name
        assert abs(without_it) <= 0.15, name


def test_races_against_trl_are_held_out_steps() -> None:
    shape, machine = SHAPES["smollm2-135m"], MACHINES["cpu"]
    found = {
        case.name: fitting.error(case, fitting.fit(fitting.read(RESULTS), shape, machine), shape, machine)
        for case in fitting.races(RESULTS)
    }
    assert found and all(abs(off) < 0.2 for off in found.values()), found


def test_our_steps_are_foretold_from_lengths_alone() -> None:
    """As `predict` does it: of the run nothing but mean lengths, the share that trained, and what scoring on the same cores adds."""
    fleet, cases = Fleet(SHAPES["smollm2-135m"], "cpu", 1), fitting.read(RESULTS)
    _, scoring = fitting.fit(cases, SHAPES["smollm2-135m"], MACHINES["cpu"])
    for case in cases:
        if case.rows:
            work = Work(
                12, 8, case.prompt_rows / 12, case.tokens / 96, int(case.longest), 0.5, mixed=case.trained / case.tokens
            )
            timing = plan(fleet, work, 1).timing
            found = timing.generate + scoring * case.scoring_s
            print(
                f"{case.name}: generate {found / case.generate_s - 1:+.0%}, update {timing.update / case.update_s - 1:+.0%}"
            )
            assert found == pytest.approx(case.generate_s, rel=0.15), case.name
            assert timing.sync == pytest.approx(case.sync_s, rel=0.35), case.name
            # that completions begin alike is not known beforehand: short answers of low entropy are overestimated
            assert 0.9 <= timing.update / case.update_s <= 1.5, case.name


def test_published_steps() -> None:
    """As close as docs/scale.md says. The step of DeepSeek-V3 (512 short samples on 256 GPUs) is all overhead, which is not here."""
    for row in fitting.PUBLISHED:
        bound = 0.70 if row.model == "deepseek-v3" else 0.12
        assert abs(fitting.published_seconds(row) / row.seconds - 1) <= bound, row


def test_the_best_split_of_64_gpus() -> None:
    work = Work(128, 8, 512, 1500, 8192)
    found = splits(Fleet(SHAPES["qwen2.5-7b"], "h100", 64, staleness=1), work)
    assert all(one.trainer_gpus + one.servers * one.server_gpus <= 64 for one in found[:-1])
    best = min(found, key=lambda one: one.timing.step)
    assert 8 <= best.trainer_gpus <= 48
    assert found[-1].trainer_gpus == 64 and found[-1].timing.staleness == 0
    assert best.timing.step < found[0].timing.step and best.timing.step < found[-2].timing.step


def test_the_size_of_a_study() -> None:
    assert study_steps(tasks=4, steps_per_stage=100, seeds=3) == 3 * 100 * (4 + 9 + 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--new-tokens", "900", "--max-new-tokens", "800"], "above"),
        (["--model-shape", "kimi-k2", "--server-gpus", "8", "--trainer-gpus", "4"], "more --server-gpus"),
        (["--trainer-gpus", "1"], "3 GPUs are the fewest"),
        (["--model-shape", "kimi-k2", "--gpus", "1024"], "--experts-stay"),
        (["--trainer-gpus", "7", "--server-gpus", "2"], "no room for a server of 2"),
        (["--trainer-gpus", "9"], "--gpus 8 leaves no room"),
        (["--plot", "x.png", "--trainer-gpus", "4"], "leave out"),
    ],
)  # fmt: skip
def test_what_cannot_be_predicted_is_said(options: list[str], message: str) -> None:
    done = CliRunner().invoke(app, ["predict", "--gpus", "8", *options])
    assert isinstance(done.exception, UserError) and message in str(done.exception)


def test_a_model_of_1t_weights_needs_its_experts_to_stay() -> None:
    options = "predict --model-shape kimi-k2 --machine h200 --gpus 1024 --trainer-gpus 512 --json".split()
    refused = CliRunner().invoke(app, options)
    assert isinstance(refused.exception, UserError) and "846 GPUs are the fewest" in str(refused.exception)
    found = [
        json.loads(CliRunner().invoke(app, [*options, "--experts-stay", *more]).output)["best"]["timing"]
        for more in ([], ["--sync-share", "0.03"], ["--sync-gb-s", "0.125"])
    ]
    assert found[1]["sync"] == pytest.approx(0.03 * found[0]["sync"])
    assert found[2]["sync"] == pytest.approx(2 * SHAPES["kimi-k2"].parameters / 0.125e9)


def test_the_command_prints_and_draws(tmp_path: Path) -> None:
    options = "predict --model-shape qwen2.5-0.5b --gpus 4 --staleness 1 --prompts 8 --new-tokens 16".split()
    shown = CliRunner().invoke(app, [*options, "--study", "10", "--price", "2", "--plot", str(tmp_path / "splits.png")])
    assert shown.exit_code == 0, shown.output
    assert "turns" in shown.output and "510 steps" in shown.output and "dollars" in shown.output
    assert "nothing measured by us" in shown.output
    assert (tmp_path / "splits.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads(CliRunner().invoke(app, [*options, "--json"]).output)
    assert all(one["timing"]["idle"] >= 0 for one in found["splits"])
    assert found["best"]["timing"]["step"] == min(one["timing"]["step"] for one in found["splits"])


def test_a_plot_where_only_turns_fit(tmp_path: Path) -> None:
    """It was a traceback; so was a name that is not that of a picture."""
    shown = CliRunner().invoke(app, ["predict", "--gpus", "3", "--prompts", "8", "--plot", str(tmp_path / "splits")])
    assert shown.exit_code == 0, shown.output
    assert (tmp_path / "splits").read_bytes().startswith(b"\x89PNG")
