"""What tasks grade with: the maths verifier, the sandbox, the judges; each made when a task first asks, stopped with the run."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from omni_fast.config import Config, recipes
from omni_fast.config import load as load_config
from omni_fast.errors import UserError
from omni_fast.policy import smollm2
from omni_fast.policy.model import load, working_dtype
from omni_fast.rewards.code import CodeVerifier
from omni_fast.rewards.judge.audit import Audit, audit
from omni_fast.rewards.judge.base import Judge
from omni_fast.rewards.judge.cache import VerdictCache
from omni_fast.rewards.judge.client import ClientLimits, JsonClient
from omni_fast.rewards.judge.embedded import EmbeddedJudge, Head, fit_head
from omni_fast.rewards.judge.encode import pooled_encoder
from omni_fast.rewards.judge.rubric import RubricJudge
from omni_fast.rewards.judge.server import Backend, Messages, OpenAIBackend, PairwiseJudge, ScoreBackend
from omni_fast.rewards.judge.server import check as check_server
from omni_fast.rewards.math import MathVerifier
from omni_fast.rewards.sandbox import Limits, Sandbox
from omni_fast.tasks.base import Resources
from omni_fast.tasks.jsonl import check, guess_block

API_KEY = "OMNI_FAST_JUDGE_KEY"  # environment variable; a key never stands in a config or a log
JUDGE_PATIENCE_S = 10.0  # how long one call waits for a judge that is down; longer waits are the run's, which says so


@dataclass
class Grading:
    """model, tokenizer: of the initial policy, for the embedded judge's features (None where no task is judged by it).

    folder: where the judge's fitted head and the verdicts of a judge server are kept. say: gets a judge server's troubles.
    """

    config: Config
    stack: ExitStack
    folder: Path
    model: PreTrainedModel | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    say: Callable[[str], None] = lambda line: None
    sandbox: Sandbox | None = field(default=None, init=False)
    judge: Judge | None = field(default=None, init=False)

    def resources(self) -> Resources:
        return Resources(cache(self._math), cache(self._code), cache(self.reward_judge), cache(RubricJudge))

    def facts(self) -> dict[str, object]:
        """For result.json."""
        sandbox = self.sandbox.describe() if self.sandbox else {"backend": "none: no task runs code"}
        judge = self.judge.name if self.judge else "none: no task is judged"
        judges = {"judge": judge, "judge_metric": RubricJudge.name}
        return {"sandbox": sandbox["backend"], "sandbox_detail": sandbox, **judges}

    def reward_judge(self) -> Judge:
        """The judge whose verdicts train; the metric comes from another one (the rubric)."""
        backend = self.config.judge.backend
        if backend == "embedded" and self.model is not None and self.tokenizer is not None:
            self.judge = self._embedded(self.model, self.tokenizer)
        else:
            self.judge = self._server() if backend in ("openai", "sglang") else RubricJudge()
        return self.judge

    def _server(self) -> PairwiseJudge:
        """A judge behind a URL, asked once here so that a mistake is told before any training."""
        wanted, salt, key = self.config.judge, f"seed {self.config.seed}", os.environ.get(API_KEY, "")
        if not wanted.url or not wanted.model:
            raise UserError(f"judge.backend '{wanted.backend}' needs judge.url and judge.model")
        limits = ClientLimits(timeout_s=wanted.timeout_s, pause_s=min(JUDGE_PATIENCE_S, self.config.rewards.pause_s))
        client = JsonClient(wanted.url, key, limits, self.say)
        server: Backend = OpenAIBackend(client, wanted.model, salt)
        if wanted.backend == "sglang":
            server = ScoreBackend(client, wanted.model, *_judge_prompts(wanted.model), salt)
        self.stack.callback(client.close)
        check_server(server)
        verdicts = VerdictCache(self.folder / "verdicts.sqlite", self.say)
        self.stack.callback(verdicts.close)
        return PairwiseJudge(server, verdicts)

    def _embedded(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> EmbeddedJudge:
        """Fitted once a run folder, so that a resume is judged by the same head."""
        encode = pooled_encoder(model, tokenizer, dtype=working_dtype(model.device))
        path = self.folder / "judge_head.json"
        if not path.is_file():  # under another name first: a kill must leave none that is half there
            fit_head(encode, self.config.seed).save(work := path.with_suffix(".writing"))
            work.replace(path)
        return EmbeddedJudge(encode, Head.load(path))

    def _math(self) -> MathVerifier:
        return self.stack.enter_context(MathVerifier())

    def _code(self) -> CodeVerifier:
        wanted = self.config.sandbox
        limits = Limits(memory_bytes=wanted.memory_mb << 20, cpu_s=wanted.cpu_s, wall_s=wanted.wall_s)
        self.sandbox = self.stack.enter_context(Sandbox(wanted.workers or None, limits, wanted.unsafe))
        return CodeVerifier(self.sandbox)


def _judge_prompts(model: str) -> tuple[Callable[[Messages], str], tuple[int, int]]:
    """How a judge's questions read to it, and the ids of its tokens " A" and " B", from its tokenizer."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(smollm2.folder()) if model == smollm2.NAME else model)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        remedy = "give what its server was started with, or use judge.backend 'openai'"
        raise UserError(f"judge.model {model!r}: its tokenizer cannot be loaded ({reason}); {remedy}") from error
    first, second = (int(tokenizer.encode(label, add_special_tokens=False)[0]) for label in (" A", " B"))
    if first == second or not tokenizer.chat_template:
        raise UserError(f"judge.model {model!r} has no chat template or no tokens for the labels; use backend 'openai'")

    def render(messages: Messages) -> str:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    return render, (first, second)


def check_data(source: str, overrides: tuple[str, ...], folder: Path) -> list[str]:
    """What would be dropped of a data file, or of the files that a config names, and why; for people."""
    with ExitStack() as stack:
        if source.endswith(".toml") or source in recipes():
            config = load_config(source, overrides)
        else:
            config = Config(tasks=[guess_block(source)])
        blocks = [block for block in config.tasks if block.kind == "jsonl"]
        if not blocks:
            raise UserError(f"{source} has no task of kind jsonl; give a config with your data, or the data itself")
        resources = Grading(config, stack, folder).resources()
        return [line for block in blocks for line in check(block, resources=resources).lines()]


def audit_judge(config: Config, folder: Path, say: Callable[[str], None] = lambda line: None) -> Audit:
    """Measure the config's judge on the shipped pairs. say: gets a judge server's troubles."""
    model = tokenizer = None
    if config.judge.backend == "embedded":
        model, tokenizer = load(config.model.path, dtype=working_dtype())
    with ExitStack() as stack:
        return audit(Grading(config, stack, folder, model, tokenizer, say).reward_judge())
