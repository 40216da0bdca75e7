"""The configuration of a run: pydantic models over TOML, with dotted overrides.

An unknown key is an error that names the nearest known one. Batch words are global, never per device:
`prompts_per_step` x `samples_per_prompt` samples make one optimiser step.
This module imports neither torch nor transformers, so `--dry-run` and `--help` are instant.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, model_validator
from pydantic_core import ErrorDetails

from omni_fast.errors import UserError

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)


class ModelConfig(Section):
    path: str = "smollm2-135m-instruct"  # that name, "tiny", a local folder, or a Hugging Face id
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the working copy; the master weights are always fp32
    device: str = "auto"
    lora_rank: NonNegative = 0  # 0 trains all weights
    lora_alpha: float = 16.0


class RolloutConfig(Section):
    prompts_per_step: Positive = 8
    samples_per_prompt: Annotated[int, Field(ge=2)] = 8
    temperature: Annotated[float, Field(gt=0.0)] = 1.0
    max_prompt_tokens: Positive = 256
    max_rows: Positive = 128  # samples decoded at the same time
    max_staleness: NonNegative = 0  # steps that samples may be behind the weights they train; > 0 overlaps the two


class EngineConfig(Section):
    """What generates. sglang: servers that run already (`urls`), or that the run starts and stops. See docs/engine.md."""

    kind: Literal["local", "sglang"] = "local"
    urls: list[str] = []  # for example ["http://127.0.0.1:30000"]; none: the run starts `servers` of its own
    # tensor: through shared memory, servers on this host only; distributed: broadcast, by gloo or (GPU) NCCL;
    # adapter: the LoRA adapter alone, beside the frozen base, which can then be the judge
    sync: Literal["disk", "tensor", "distributed", "adapter"] = "disk"
    in_flight: Positive = 32  # groups a server works on at a time
    request_timeout_s: Annotated[float, Field(gt=0.0)] = 300.0  # of one group
    wait_s: Annotated[float, Field(ge=0.0)] = 600.0  # for servers that start, or are all down
    servers: Positive = 1
    sleep: bool = False  # servers share the trainer's GPU: they give its memory back while the policy is updated
    dtype: str = "auto"  # SGLang's --dtype
    flags: list[str] = []  # SGLang's own, passed on as they are
    start_timeout_s: Annotated[float, Field(gt=0.0)] = 600.0


class LossConfig(Section):
    policy: Literal["grpo", "dapo", "dr_grpo", "bnpo", "cispo", "gspo"] = "dapo"
    eps_low: Annotated[float, Field(gt=0.0)] = 0.2
    eps_high: Annotated[float, Field(gt=0.0)] = 0.28
    beta: Annotated[float, Field(ge=0.0)] = 0.0  # KL to the reference policy; > 0 keeps a frozen copy of the weights
    entropy_bonus: float = 0.0
    advantage_scale: Literal["std", "none"] = "std"


class OptimizerConfig(Section):
    learning_rate: Annotated[float, Field(gt=0.0)] = 2e-5
    warmup_steps: NonNegative = 2  # linear, at the start of each stage
    beta1: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    beta2: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.95
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    max_grad_norm: Annotated[float, Field(gt=0.0)] = 1.0
    tokens_per_microbatch: Positive = 2048  # memory only: never changes the result
    gradient_checkpointing: bool = False  # keep only each layer's input: less memory, one more forward pass


class CurriculumConfig(Section):
    mode: Literal["curriculum", "reversed", "random", "order", "joint"] = "curriculum"
    order: list[str] = []  # for mode "order"
    steps_per_stage: Positive = 12
    replay_fraction: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0  # of a stage's prompts, from earlier stages' tasks
    refresh_steps: NonNegative = 0  # a last short stage on the task with the largest realised drop

    @property
    def measures_transfer(self) -> bool:
        """Whether the order comes from measured transfer, so that single-task runs are needed."""
        return self.mode in ("curriculum", "reversed")


class EvaluationConfig(Section):
    select_items: Positive = 48  # per task; decides: transfer, order
    test_items: Positive = 100  # per task; is reported
    probe_items: NonNegative = 16  # per task; fixed completions on which the entropy is read after each stage
    bootstrap_draws: Positive = 2000


class CheckpointConfig(Section):
    every_steps: Positive = 10
    keep_last: Positive = 2


class RewardConfig(Section):
    """How the parts of a task's score become one reward, where it is not the task's own way.

    Besides the task's part (`correct`, `tests` or `preference`) any task can have `format` (the answer is marked:
    \\boxed, ####, <answer>, or a code block) and `unrepeated` (1 minus the share of repeated word triples).
    """

    kind: Literal["own", "additive", "gated", "normalised"] = "own"  # normalised: per part inside the group (GDPO)
    weights: dict[str, float] = {}  # part -> weight
    gate: str = ""  # gated: the part that must reach the threshold before the others count
    gate_threshold: float = 1.0

    @model_validator(mode="after")
    def _weights_and_kind(self) -> RewardConfig:
        if (self.kind == "own") != (not self.weights):
            raise ValueError("a reward needs both kind (additive, gated or normalised) and weights, or neither")
        return self


class TaskConfig(Section):
    """One domain. `kind` names a built-in domain, `jsonl` (a file of the user) or `python` (a class of the user)."""

    name: str
    kind: Literal["math", "code", "qa", "writing", "jsonl", "python"]
    level: str = "default"  # of a built-in domain; "tiny" is made for the model "tiny"
    max_new_tokens: Positive = 16  # while training; evaluation allows twice as many
    system: str | None = None  # None: the domain's own
    weight: Annotated[float, Field(gt=0.0)] = 1.0  # share in joint training
    file: str = ""  # jsonl: JSON lines or parquet
    prompt: str = ""  # jsonl: template with {column} places
    answer: str = ""  # jsonl: column (or template) of the gold answer
    reference: str = ""  # jsonl: column of the reference reply (verifier "judge")
    verifier: Literal["", "math", "qa", "code", "judge"] = ""  # jsonl
    cls: str = ""  # python: "module:Class"
    reward: RewardConfig = RewardConfig()

    @model_validator(mode="after")
    def _fields_of_the_kind(self) -> TaskConfig:
        if not re.fullmatch(r"\w[\w.-]*", self.name):
            raise ValueError("a task's name is letters, digits, '_', '-' and '.': it becomes part of folder names")
        needed = {"jsonl": ("file", "prompt", "verifier"), "python": ("cls",)}.get(self.kind, ())
        missing = [key for key in needed if not getattr(self, key)]
        if missing:
            raise ValueError(f"task '{self.name}' of kind '{self.kind}' needs {', '.join(missing)}")
        return self


class JudgeConfig(Section):
    # openai: any OpenAI-compatible URL; sglang: /v1/score of an SGLang server, label probabilities instead of text
    backend: Literal["embedded", "rubric", "openai", "sglang"] = "embedded"
    # openai, sglang: for example http://127.0.0.1:30000/v1; none: the engine's own server, whose base model judges
    url: str = ""
    model: str = ""  # as the server knows it; sglang: also where its tokenizer is found (folder or Hugging Face id)
    timeout_s: Annotated[float, Field(gt=0.0)] = 60.0  # of one request, all in


class RewardsConfig(Section):
    """When nothing can score (a judge is down, a worker lost), samples are invalid, never 0, and the run may pause."""

    # share of a task's samples in a step that may go without a score; above, the run pauses
    max_invalid: Annotated[float, Field(ge=0.0, le=1.0)] = 0.2
    pause_s: Annotated[float, Field(ge=0.0)] = 600.0  # how long it waits before it stops, resumable


class SandboxConfig(Section):
    workers: NonNegative = 0  # 0: one per core
    memory_mb: Positive = 512
    cpu_s: Positive = 2
    wall_s: Annotated[float, Field(gt=0.0)] = 4.0
    unsafe: bool = False  # run model-written code without isolation; logged and in the report


class LoggingConfig(Section):
    tensorboard: bool = False
    trackio: bool = False
    wandb: bool = False


class Config(Section):
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    threads: Annotated[int, Field(ge=0, le=1024)] = 0  # 0: the cores this process may use
    model: ModelConfig = ModelConfig()
    rollout: RolloutConfig = RolloutConfig()
    engine: EngineConfig = EngineConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    curriculum: CurriculumConfig = CurriculumConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    judge: JudgeConfig = JudgeConfig()
    rewards: RewardsConfig = RewardsConfig()
    sandbox: SandboxConfig = SandboxConfig()
    logging: LoggingConfig = LoggingConfig()
    tasks: Annotated[list[TaskConfig], Field(min_length=1)]

    @model_validator(mode="after")
    def _sections_agree(self, info: ValidationInfo) -> Config:
        if info.context:  # a fingerprint
            return self
        names = [task.name for task in self.tasks]
        if len(set(names)) < len(names):
            raise ValueError(f"task names must differ, got {names}")
        order, mode = self.curriculum.order, self.curriculum.mode
        if mode == "order" and sorted(order) != sorted(names):
            raise ValueError(f"curriculum.order must name each task once: expected some order of {names}, got {order}")
        if self.rollout.max_staleness and self.engine.kind == "local":
            raise ValueError(f"max_staleness {self.rollout.max_staleness} needs engine.kind 'sglang'; else set it to 0")
        if self.rollout.max_staleness and self.judge_generates:
            raise ValueError(
                "judge.backend 'sglang' on a server that generates meanwhile (rollout.max_staleness > 0): SGLang 0.5.17 dies of "
                "labels and samples in one batch; use judge.backend 'openai' on that server, or a server of its own"
            )
        if self.engine.kind == "sglang" and self.engine.sync == "adapter" and not self.model.lora_rank:
            raise ValueError("engine.sync 'adapter' brings servers a LoRA adapter and model.lora_rank is 0: set it")
        if self.engine.sleep and (self.engine.kind == "local" or self.rollout.max_staleness):
            raise ValueError("engine.sleep needs engine.kind 'sglang' and rollout.max_staleness 0: sleep or generate")
        if self.judge.backend in ("openai", "sglang") and not self.judge.url and not self.adapter_rank:
            raise ValueError(
                f"judge.backend '{self.judge.backend}' needs judge.url; without one the engine's own server judges, whose "
                "base stays as it is only with engine.kind 'sglang', engine.sync 'adapter' and model.lora_rank > 0"
            )
        return self

    @property
    def adapter_rank(self) -> int:
        """Of the adapter that the engine's servers hold beside the frozen base; 0: they hold the policy whole."""
        return self.model.lora_rank if (self.engine.kind, self.engine.sync) == ("sglang", "adapter") else 0

    @property
    def judge_generates(self) -> bool:
        """Whether the judge gives labels from a server that also generates."""
        judge, *servers = (url.rstrip("/").removesuffix("/v1") for url in [self.judge.url, *self.engine.urls])
        return self.engine.kind == "sglang" and self.judge.backend == "sglang" and judge in ("", *servers)

    def fingerprint(self) -> dict[str, Any]:
        """All that the result depends on: neither logging nor checkpoints, nor where servers stand and how they are waited for."""
        judge = {"url": True, "timeout_s": True}
        engine = dict.fromkeys(EngineConfig.model_fields.keys() - {"kind", "dtype", "flags"}, True)
        parts: dict[str, Any] = {"judge": judge, "engine": engine, "logging": True, "checkpoint": True, "rewards": True}
        return self.model_dump(mode="json", exclude=parts)

    @classmethod
    def of_fingerprint(cls, data: Any) -> Config:
        """With defaults for what a fingerprint leaves out, so that sections need not agree. Raises ValidationError."""
        return cls.model_validate(data, context=True)


C = TypeVar("C", bound=Config)


def load(source: str, overrides: Sequence[str] = ()) -> Config:
    """Read a TOML file, or a recipe that ships with the package by its name, and apply `key.sub=value` overrides.

    Raises UserError naming the file, the key and the remedy.
    """
    data = read(source, overrides)
    if "study" in data:
        raise UserError(f"{source} is a study; run it with: omni-fast study {source}")
    return validated(source, data, Config)


def read(source: str, overrides: Sequence[str]) -> dict[str, Any]:
    """The keys of a TOML file or recipe with the overrides in their places."""
    path, shipped = Path(source), resources.files("omni_fast.recipes").joinpath(f"{source}.toml")
    if not path.is_file() and source not in recipes():
        raise UserError(f"no config file or recipe '{source}'; recipes: {', '.join(recipes())}")
    try:
        data = tomllib.loads((path if path.is_file() else shipped).read_text(encoding="utf-8"))
    except ValueError as error:  # of TOML or of UTF-8
        raise UserError(f"{source} is not valid TOML: {error}") from None
    except OSError as error:
        raise UserError(f"{source} cannot be read ({error.strerror}); check its permissions") from error
    for override in overrides:
        _apply_override(data, override)
    return data


def validated(source: str, data: dict[str, Any], model: type[C]) -> C:
    """UserError for each key that is unknown, missing or wrong."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise UserError(f"{source}: " + "; ".join(_explain(item, data, model) for item in error.errors())) from None


def recipes() -> list[str]:
    """Names of the recipes that ship with the package."""
    folder = resources.files("omni_fast.recipes")
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def _apply_override(data: dict, override: str) -> None:
    """`a.b=value` or `tasks.NAME.key=value`; the value is TOML, or a bare string."""
    path, separator, text = override.partition("=")
    if not separator or not path.strip():
        raise UserError(f"override '{override}' is no KEY=VALUE; write for example rollout.prompts_per_step=4")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    node: Any = data
    *sections, last = path.strip().split(".")
    for depth, key in enumerate(sections, start=1):
        if isinstance(node, list):  # the list of tasks is addressed by name
            node = {entry.get("name"): entry for entry in node if isinstance(entry, dict)}.get(key)
        else:
            node = node.setdefault(key, {})
        if node is not None and not isinstance(node, dict | list):
            raise UserError(f"override '{override}': '{'.'.join(sections[:depth])}' is a value, not a section")
        if node is None or isinstance(node, list) and depth == len(sections):
            names = ", ".join(str(entry.get("name")) for entry in data.get("tasks", ()) if isinstance(entry, dict))
            raise UserError(f"override '{override}': a task's key is tasks.NAME.KEY, with a NAME of {names}")
    node[last] = value


def _explain(item: ErrorDetails, data: dict[str, Any], model: type[Config]) -> str:  # one line per pydantic error
    parts = list(map(str, item["loc"]))
    if parts[:1] == ["tasks"] and len(parts) > 1 and isinstance(entry := data["tasks"][int(parts[1])], dict):
        parts[1] = str(entry.get("name", parts[1]))  # as an override has it
    where = ".".join(parts) or "config"
    if item["type"] == "extra_forbidden":
        known = _keys_at(item["loc"][:-1], model)
        close = difflib.get_close_matches(str(item["loc"][-1]), known, n=1, cutoff=0.5)
        return f"unknown key '{where}'" + (f"; did you mean '{close[0]}'?" if close else f"; known: {', '.join(known)}")
    if item["type"] == "missing":
        return f"'{where}' is missing"
    got = item.get("input")
    shown = f", got {got!r}" if not isinstance(got, dict | list) else ""
    return f"'{where}': {item['msg'].removeprefix('Value error, ')}{shown}"


def _keys_at(location: tuple, model: type[BaseModel]) -> list[str]:
    for part in location:
        if isinstance(part, str):
            annotation = model.model_fields[part].annotation
            model = annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else TaskConfig
    return list(model.model_fields)
