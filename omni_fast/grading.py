"""What tasks grade with: the maths verifier, the sandbox, the judges; each made when a task first asks, stopped with the run."""

from __future__ import annotations

import os
from contextlib import ExitStack
from functools import cache
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from omni_fast.config import Config, TaskConfig, recipes
from omni_fast.config import load as load_config
from omni_fast.errors import UserError
from omni_fast.policy.model import load
from omni_fast.policy.update import working_dtype
from omni_fast.rewards.code import CodeVerifier
from omni_fast.rewards.judge.audit import Audit, audit
from omni_fast.rewards.judge.base import Judge
from omni_fast.rewards.judge.cache import VerdictCache
from omni_fast.rewards.judge.client import ClientLimits
from omni_fast.rewards.judge.embedded import EmbeddedJudge, Head, fit_head
from omni_fast.rewards.judge.encode import pooled_encoder
from omni_fast.rewards.judge.rubric import RubricJudge
from omni_fast.rewards.judge.server import OpenAIBackend, PairwiseJudge
from omni_fast.rewards.math import MathVerifier
from omni_fast.rewards.sandbox import Limits, Sandbox
from omni_fast.tasks import Resources
from omni_fast.tasks.jsonl import check, guess_block

API_KEY = "OMNI_FAST_JUDGE_KEY"  # environment variable; a key never stands in a config or a log


class Grading:
    """model, tokenizer: of the initial policy, for the embedded judge's features (None where no task is judged by it).

    folder: where the judge's fitted head and the verdicts of a judge server are kept.
    """

    def __init__(
        self,
        config: Config,
        stack: ExitStack,
        folder: Path,
        model: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        self.config, self.stack, self.folder, self.model, self.tokenizer = config, stack, folder, model, tokenizer
        self.sandbox: Sandbox | None = None
        self.judge: Judge | None = None

    def resources(self) -> Resources:
        return Resources(cache(self._math), cache(self._code), cache(self.reward_judge), cache(RubricJudge))

    def facts(self) -> dict[str, object]:
        """For result.json."""
        sandbox = self.sandbox.describe() if self.sandbox else {"backend": "none: no task runs code"}
        judge = self.judge.name if self.judge else "none: no task is judged"
        return {
            "sandbox": sandbox["backend"],
            "sandbox_detail": sandbox,
            "judge": judge,
            "judge_metric": RubricJudge().name,
        }

    def reward_judge(self) -> Judge:
        """The judge whose verdicts train; the metric comes from another one (the rubric)."""
        wanted = self.config.judge
        if wanted.backend == "embedded" and self.model is not None and self.tokenizer is not None:
            self.judge = self._embedded(self.model, self.tokenizer)
        elif wanted.backend == "openai":
            if not wanted.url or not wanted.model:
                raise UserError("judge.backend 'openai' needs judge.url and judge.model")
            limits = ClientLimits(timeout_s=wanted.timeout_s)
            server = OpenAIBackend(wanted.url, wanted.model, api_key=os.environ.get(API_KEY, ""), limits=limits)
            verdicts = VerdictCache(self.folder / "verdicts.sqlite")
            self.stack.callback(verdicts.close)
            self.judge = PairwiseJudge(server, verdicts)
        else:
            self.judge = RubricJudge()
        return self.judge

    def _embedded(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> EmbeddedJudge:
        """Fitted once a run folder, so that a resume is judged by the same head."""
        encode = pooled_encoder(model, tokenizer, dtype=working_dtype(model.device))
        path = self.folder / "judge_head.json"
        if not path.is_file():
            fit_head(encode, self.config.seed).save(path)
        return EmbeddedJudge(encode, Head.load(path))

    def _math(self) -> MathVerifier:
        return self.stack.enter_context(MathVerifier())

    def _code(self) -> CodeVerifier:
        wanted = self.config.sandbox
        limits = Limits(memory_bytes=wanted.memory_mb << 20, cpu_s=wanted.cpu_s, wall_s=wanted.wall_s)
        self.sandbox = self.stack.enter_context(Sandbox(wanted.workers or None, limits, wanted.unsafe))
        return CodeVerifier(self.sandbox)


def check_data(source: str, overrides: tuple[str, ...], folder: Path) -> list[str]:
    """What would be dropped of a data file, or of the files that a config names, and why; for people."""
    with ExitStack() as stack:
        if source.endswith(".toml") or source in recipes():
            config = load_config(source, overrides)
        else:
            config = Config(tasks=[guess_block(source)])
        blocks: list[TaskConfig] = [block for block in config.tasks if block.kind == "jsonl"]
        if not blocks:
            raise UserError(
                f"{source} has no task of kind jsonl; give a config with your data, or the data file itself"
            )
        resources = Grading(config, stack, folder).resources()
        return [line for block in blocks for line in check(block, resources=resources).lines()]


def audit_judge(config: Config, folder: Path) -> Audit:
    """Measure the config's judge on the shipped pairs."""
    model = tokenizer = None
    if config.judge.backend == "embedded":
        model, tokenizer = load(config.model.path, dtype=working_dtype())
    with ExitStack() as stack:
        return audit(Grading(config, stack, folder, model, tokenizer).reward_judge())
