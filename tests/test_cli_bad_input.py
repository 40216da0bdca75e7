"""What a user can get wrong: one clear message on stderr, exit code 2 (a mistake) or 1 (a failure), no traceback.

The command line runs inside the test process: an exception that is not turned into a message fails the test by itself.
"""

from __future__ import annotations

import io
import json
import random
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
from rich.console import Console
from transformers import AutoTokenizer

from omni_fast import build, doctor
from omni_fast.checkpoint import run_lock
from omni_fast.cli import main
from omni_fast.config import load
from omni_fast.policy.tiny import tiny_model
from omni_fast.progress import Progress
from omni_fast.run import Run
from omni_fast.tasks.base import Split
from omni_fast.tasks.splits import partition


class Done(NamedTuple):
    code: int
    out: str
    error: str


Omni = Callable[..., Done]

SUMS = [{"question": f"{a}+{b}=?", "answer": str(a + b)} for a in range(1, 5) for b in range(1, 6)]


@pytest.fixture
def omni(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Omni:
    def run(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["omni-fast", *(str(argument) for argument in arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        out, error = capsys.readouterr()
        assert "Traceback" not in out + error
        return Done(int(stop.value.code or 0), out, error)

    return run


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chat model that has learned nothing."""
    folder = tmp_path_factory.mktemp("model")
    rows = [(row["question"], row["answer"], "0") for row in SUMS]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMNI_FAST_HOME", str(tmp_path_factory.mktemp("home")))
        made, tokenizer = tiny_model(rows, seed=0, steps=1)
    made.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class Job:
    """A config on disk with one task of the user's own; its data are what a test writes."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.run, self.data, self.config = folder / "run", folder / "sums.jsonl", folder / "job.toml"
        self.config.write_text(
            f'model = {{ path = "{model}", dtype = "float32" }}\nthreads = 1\n'
            "rollout = { prompts_per_step = 2, samples_per_prompt = 2 }\n"
            'curriculum = { mode = "order", order = ["sums"], steps_per_stage = 1 }\n'
            "evaluation = { select_items = 2, test_items = 2, probe_items = 1, bootstrap_draws = 50 }\n"
            f'[[tasks]]\nname = "sums"\nkind = "jsonl"\nfile = "{self.data}"\nprompt = "{{question}}"\n'
            'answer = "answer"\nverifier = "qa"\nmax_new_tokens = 2\n'
        )
        self.write(*(json.dumps(row) for row in SUMS))

    def write(self, *lines: str) -> None:
        self.data.write_text("".join(line + "\n" for line in lines))

    @property
    def command(self) -> tuple[str, ...]:
        return ("train", str(self.config), "--run", str(self.run))


@pytest.fixture
def job(tmp_path: Path, model: Path) -> Job:
    return Job(tmp_path, model)


def refused(done: Done, *words: str, code: int = 2) -> None:
    assert done.code == code, done
    assert done.error.startswith("error: "), done.error
    for word in words:
        assert word in done.error, done.error


# What is told before anything is loaded.


def test_an_unknown_command_and_an_unknown_option(omni: Omni) -> None:
    for arguments in (("trian", "quickstart"), ("train", "quickstart", "--rnu", "x"), ("plan",)):
        done = omni(*arguments)
        assert done.code == 2 and "Usage" in done.error


def test_an_unknown_config_key(omni: Omni) -> None:
    done = omni("train", "quickstart-tiny", "rollout.prompt_per_step=4")
    refused(done, "unknown key 'rollout.prompt_per_step'", "did you mean 'prompts_per_step'?")


def test_a_wrong_type(omni: Omni) -> None:
    refused(omni("quickstart", "--tiny", "seed=many"), "'seed'", "'many'")


def test_no_config_file(omni: Omni, tmp_path: Path) -> None:
    refused(omni("train", tmp_path / "no.toml"), "no.toml", "recipes: quickstart")


@pytest.mark.parametrize("command", ["plan", "report"])
def test_no_run_folder(omni: Omni, tmp_path: Path, command: str) -> None:
    refused(omni(command, tmp_path / "none"), str(tmp_path / "none"), "not a run folder")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--prompts", "1000000"), "32,000,000 samples to simulate"),
        (("--staleness", "5000"), "--staleness"),
        (("--hours-between-failures", "1e-9"), "samples hardly ever end"),
        (("--gpus", "3", "--plot", "/no/such/folder/splits.png"), "splits.png cannot be written (No such file"),
    ],
)
def test_a_prediction_that_would_never_end(omni: Omni, arguments: tuple[str, ...], words: str) -> None:
    refused(omni("predict", *arguments), words)


# Data.


def test_no_data_file(omni: Omni, job: Job) -> None:
    job.data.unlink()
    refused(omni(*job.command), str(job.data))
    refused(omni("data", "check", job.data), str(job.data))


def test_a_malformed_line_has_its_number(omni: Omni, job: Job) -> None:
    job.write(*(json.dumps(row) for row in SUMS[:2]), '{"question": "1+1=?", "answer": ', json.dumps(SUMS[3]))
    refused(omni(*job.command), str(job.data), "line 3")
    refused(omni("data", "check", job.data), "line 3")


@pytest.mark.parametrize("lines", [(), ("", "  ")])
def test_an_empty_data_set(omni: Omni, job: Job, lines: tuple[str, ...]) -> None:
    job.write(*lines)
    refused(omni(*job.command), str(job.data), "no rows")


def test_golds_that_fail_their_own_verifier_are_counted_and_shown(omni: Omni, job: Job) -> None:
    bad = [{"question": f"How many items are in box {n}?", "answer": "quite a few"} for n in range(7)]
    job.write(*(json.dumps(row) for row in [*SUMS[:4], *bad]))
    done = omni("data", "check", job.config, "tasks.sums.verifier=math")
    assert done.code == 0
    assert "4 items pass" in done.out and "7 dropped" in done.out and "line 5" in done.out and "box 0" in done.out
    refused(omni(*job.command, "tasks.sums.verifier=math"), "sums", "at least 10 usable items", "7 dropped", "line 5")


def test_a_column_that_is_not_there(omni: Omni, job: Job) -> None:
    refused(omni(*job.command, "tasks.sums.prompt={riddle}"), "no column riddle", "question")


def test_a_prompt_above_the_limit_is_named_before_any_training(omni: Omni, job: Job) -> None:
    long = {"id": "epic", "question": "1+1=? " * 200, "answer": "2"}
    job.write(*(json.dumps(row) for row in [*SUMS, long]))
    done = omni(*job.command)
    refused(done, "'epic'", "the limit is 256", "rollout.max_prompt_tokens")
    assert "step" not in done.out


def test_a_sample_beyond_the_token_budget_is_named_before_the_folder_is_bound(omni: Omni, job: Job) -> None:
    for budget in (5, 6):  # the second time it is not a folder of another configuration
        done = omni(*job.command, f"optimizer.tokens_per_microbatch={budget}")
        refused(done, f"a micro-batch holds {budget}", "optimizer.tokens_per_microbatch", "max_new_tokens")


def test_the_token_budget_keeps_nobody_from_scoring_nor_from_going_on(omni: Omni, job: Job) -> None:
    """Nothing is trained where a model is only scored; a run that has begun can have no other budget any more."""
    small = "optimizer.tokens_per_microbatch=5"
    assert omni("eval", job.config, small).code == 0
    assert omni(*job.command).code == 0
    for name, section, key, value in (
        ("fingerprint", "optimizer", "tokens_per_microbatch", 5),  # as an earlier version has begun it
        ("state", "", "finished", False),
    ):
        path = job.run / f"{name}.json"
        kept = json.loads(path.read_text())
        (kept[section] if section else kept)[key] = value
        path.write_text(json.dumps(kept))
    assert omni(*job.command, small).code == 0


def test_a_probe_beyond_the_token_budget_is_named_too(omni: Omni, job: Job) -> None:
    """Its entropy is read after the first evaluation, when the folder is bound to the budget."""
    shares: dict[Split, float] = {"train": 0.7, "select": 0.1, "test": 0.2}
    probe = partition(range(len(SUMS)), shares, random.Random("jsonl:sums:0"))["select"][0]
    rows = [dict(row) for row in SUMS]
    rows[probe]["question"] *= 10
    job.write(*map(json.dumps, rows))
    refused(omni(*job.command, "optimizer.tokens_per_microbatch=40"), "a micro-batch holds 40")


def test_text_of_the_data_that_looks_like_markup_is_shown_as_it_is(omni: Omni, job: Job) -> None:
    bad = {"question": "[INST] 1+1=? [/INST]", "answer": "[/INST]"}
    job.write(*(json.dumps(row) for row in [*SUMS, bad, bad]))
    for command in (job.command, ("report", job.run), ("data", "check", job.config)):
        done = omni(*command)
        assert done.code == 0, done
        assert "[INST] 1+1=? [/INST]" in done.out or command[0] == "report"


def test_a_prompt_template_without_a_column(omni: Omni, job: Job) -> None:
    refused(omni(*job.command, "tasks.sums.prompt=Add them."), "'Add them.'", "{column}", "'question'")


UNSCORED = """
from omni_fast.rewards.compose import Composition
from omni_fast.tasks.base import Item

class Down:
    system, max_new_tokens, composition = "", 2, Composition("additive", {"correct": 1.0})

    def __init__(self, name, seed, max_new_tokens):
        self.name = name

    def items(self, split):
        return [Item(split, "1+1=?")]

    def score(self, items, completions):
        raise AssertionError

    def metric(self, items, completions):
        return [None for _ in items]
"""


def test_a_task_that_nothing_could_score(omni: Omni, job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "unscored.py").write_text(UNSCORED)
    monkeypatch.syspath_prepend(str(tmp_path))
    done = omni("eval", job.config, "tasks.sums.kind=python", "tasks.sums.cls=unscored:Down")
    assert done.code == 0 and "sums         –  [–, –]  n=0" in done.out, done


# The model.


def test_no_such_device(omni: Omni, job: Job) -> None:
    refused(omni(*job.command, "model.device=gpu"), "model.device 'gpu'", "'auto', 'cpu' or 'cuda'")


def test_a_model_without_chat_template(omni: Omni, job: Job, model: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in model.iterdir():
        if file.name != "chat_template.jinja":
            (bare / file.name).write_bytes(file.read_bytes())
    tokenizer = AutoTokenizer.from_pretrained(bare)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(bare)
    refused(omni(*job.command, f"model.path={bare}"), "no chat template", "instruct")


def test_no_such_model(omni: Omni, job: Job, tmp_path: Path) -> None:
    refused(omni(*job.command, f"model.path={tmp_path / 'none'}"), "no model folder")
    (tmp_path / "empty").mkdir()  # and the same run folder may be used with the mistake corrected
    refused(omni(*job.command, f"model.path={tmp_path / 'empty'}"), "config.json")


# The run folder.


def test_a_run_folder_that_cannot_be_written(omni: Omni, job: Job, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("not a folder")
    refused(omni("train", job.config, "--run", file / "run"), str(file / "run"), "cannot be written")
    assert file.read_text() == "not a folder"


def test_a_home_that_the_shell_left_alone(omni: Omni, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--run=~/x`: what was measured went to one folder and was looked for in another."""
    monkeypatch.setenv("HOME", str(job.run.parent))
    monkeypatch.setattr("omni_fast.train.measure", lambda config, folder, progress: print(f"measures in {folder}"))
    done = omni("transfer", job.config, f"--run=~/{job.run.name}", "curriculum.mode=curriculum")
    assert f"measures in {job.run}" in done.out and f"error: {job.run} is not a run folder" in done.error, done


@pytest.mark.parametrize(
    "overrides",
    [
        ("judge.backend=openai", "judge.url=http://j/v1", "judge.model=m"),
        ("engine.kind=sglang", "engine.sync=adapter", "model.lora_rank=8", "judge.backend=sglang"),
        (
            "engine.kind=sglang",
            "rollout.max_staleness=1",
            "judge.backend=sglang",
            "judge.url=http://j",
            "judge.model=m",
        ),
    ],
)
def test_a_run_with_served_judges_is_read(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    """Where servers stand is not kept, so `plan` and `report` said that another version had made the run."""
    with Run.open(tmp_path, load("quickstart", overrides)) as run:
        run.bind()
        run.finish()
    assert Run.read(tmp_path).config.fingerprint() == load("quickstart", overrides).fingerprint()


def test_two_processes_on_one_run_folder(omni: Omni, job: Job) -> None:
    with run_lock(job.run):
        refused(omni(*job.command), str(job.run), "Another process (pid ")


def test_a_finished_run_needs_no_other_ranks(omni: Omni, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """They waited ten minutes for rank 0, which had nothing to do and was gone."""
    job.run.mkdir()
    (job.run / "state.json").write_text('{"finished": true}')
    monkeypatch.setenv("RANK", "1")
    assert omni(*job.command) == Done(0, "", "")
    (job.run / "state.json").write_text('{"finished": tr')
    refused(omni(*job.command), "state.json is damaged")


@contextmanager
def small_files(size: int) -> Iterator[None]:
    """Writing beyond `size` fails, as on a full disk."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_then_another_config_then_the_same_command_again(omni: Omni, job: Job) -> None:
    with small_files(200_000):
        full = omni(*job.command)
    refused(full, str(job.run), "could not be written", "run the same command again", code=1)
    assert not [path for path in job.run.rglob(".writing*")], "half-written files are swept"

    refused(
        omni(*job.command, "optimizer.learning_rate=0.5"), "another configuration", "learning_rate was 2e-05 and is 0.5"
    )

    done = omni(*job.command)  # room again: it goes through; the model knows nothing, so no group is mixed
    assert done.code == 0, done
    assert "warning: sums: only 0% of its groups have unequal rewards" in done.out and "raise" in done.out
    assert json.loads((job.run / "result.json").read_text())["status"] == "finished"

    metrics = job.run / "metrics.jsonl"
    with small_files(metrics.stat().st_size // 2):  # a finished run needs no room for metrics, but some for its report
        refused(omni("report", job.run), "result.json", code=1)
    assert json.loads((job.run / "result.json").read_text())["status"] == "finished"


def test_a_row_that_a_full_disk_cut_off_stops_neither_report_nor_resume(omni: Omni, job: Job) -> None:
    assert omni(*job.command).code == 0
    state = json.loads((job.run / "state.json").read_text())
    (job.run / "state.json").write_text(json.dumps(state | {"finished": False}))
    rows = (job.run / "metrics.jsonl").read_bytes()
    (job.run / "metrics.jsonl").write_bytes(rows + b'{"event": "st')
    assert omni("report", job.run).code == 0
    assert omni(*job.command).code == 0
    assert json.loads((job.run / "result.json").read_text())["status"] == "finished"


def test_data_that_changed_under_a_run(omni: Omni, job: Job) -> None:
    assert omni(*job.command).code == 0
    state = json.loads((job.run / "state.json").read_text())
    (job.run / "state.json").write_text(json.dumps(state | {"finished": False}))
    job.write(*(json.dumps(row) for row in SUMS[:-1]))
    refused(omni(*job.command), str(job.run), "other items of sums", "give another folder")
    job.write(*(json.dumps(row) for row in SUMS))
    assert omni(*job.command).code == 0


def test_transfer_where_the_order_is_given(omni: Omni, job: Job) -> None:
    done = omni("transfer", job.config, "--run", job.run)
    refused(done, "curriculum.mode 'order' measures no transfer", "curriculum.mode=curriculum")
    assert not job.run.exists()


def test_a_plan_before_transfer_is_measured(omni: Omni, job: Job) -> None:
    assert omni(*job.command).code == 0
    settings = json.loads((job.run / "fingerprint.json").read_text())
    settings["curriculum"]["mode"] = "curriculum"
    (job.run / "fingerprint.json").write_text(json.dumps(settings))
    refused(omni("plan", job.run), str(job.run), "no scores of 'single:sums' yet", "`omni-fast train`")


def test_the_doctor_knows_the_processors_that_the_policy_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    """An Arm with bf16 was told that it had none, and trained in bf16."""
    monkeypatch.setattr(Path, "read_text", lambda self, *how, **more: "Features : fp asimd bf16")
    assert ("bf16 units", True, "used") in doctor.examine()


def test_a_terminal_sees_what_plain_lines_tell() -> None:
    """Tokens/s and what a step waited for were only in the plain lines."""
    said, values = [], {"reward": 0.5, "entropy": None, "mixed_groups": 1.0, "signs": {}}
    seconds = {"generate": 1.0, "reward": 0.0, "update": 2.0, "sync": 0.1, "total": 3.1}
    row = {"stage": "a", "step": 1, "tasks": {"sums": values}, "tokens_per_s": 1240.0, "seconds": seconds,
           "waited_for": "update", "max_staleness": 1, "update": {"staleness_mean": 1.0, "bad_steps": 2.0}}  # fmt: skip
    for terminal in (True, False):
        progress = Progress(Console(file=io.StringIO(), force_terminal=terminal, width=400))
        progress.step(row, 3)  # type: ignore[arg-type]
        assert "gradient was not finite, it is skipped (2 since" in progress.console.file.getvalue()  # type: ignore[attr-defined]
        said.append(progress._panel().plain if terminal else progress.console.file.getvalue())  # type: ignore[attr-defined]
    for shown in said:
        for part in (
            "step 1/3",
            "sums: reward 0.500 entropy – mixed 100%",
            "1240 tokens/s  3.1 s (update)  generate 1.0",
        ):
            assert part in shown


def test_the_tiny_model_goes_to_the_device_asked_for() -> None:
    config = load("quickstart-tiny", ["model.device=meta"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "tiny_model", lambda rows, seed, device="cpu": device)
        assert build.load_model(config) == "meta"


def test_damaged_files_of_a_run(omni: Omni, job: Job) -> None:
    job.run.mkdir()
    (job.run / "fingerprint.json").write_text("{")
    refused(omni(*job.command), "fingerprint.json", "not valid JSON")
    refused(omni("report", job.run), "not a run folder")
    (job.run / "fingerprint.json").unlink()
    (job.run / "state.json").write_text('{"trained": ')
    refused(omni(*job.command), "state.json", "damaged")
