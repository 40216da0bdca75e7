"""TRL's GRPOTrainer as a contender: its own training loop, held before each step until the step is wanted.

Phases are clocked around its methods: generate, reward, and of the update the loss, the backward pass and the optimiser.
"""

from __future__ import annotations

import statistics
import tempfile
import warnings
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback
from transformers.utils import is_flash_attn_2_available

from benchmarks.train import case as shared
from benchmarks.train.case import Case
from benchmarks.train.worker import Hello, Reporter

PAGED: dict[str, object] = {"max_memory_percent": 0.2}  # the other contenders share the GPU


@dataclass(frozen=True)
class Setting:
    """Of GRPOTrainer, where there is a choice of speed.

    weights: "float32" trains fp32 weights under bf16 autocast, as TRL's defaults do; "bfloat16" has weights, gradients and
    moments in bf16. samples: of a micro-batch. checkpointing: keep only each layer's input (TRL's default).
    continuous_batching: generate with transformers' paged engine, not with `generate`. liger: Liger's layers.
    """

    weights: str = "bfloat16"
    samples: int = 48
    checkpointing: bool = False
    continuous_batching: bool = False
    liger: bool = False

    @property
    def name(self) -> str:
        weights = "bf16 weights" if self.weights == "bfloat16" else "fp32 weights, bf16 autocast"
        more = {", checkpointing": self.checkpointing, ", paged": self.continuous_batching, ", Liger": self.liger}
        return f"TRL, {weights}, {self.samples} samples a pass" + "".join(name for name, on in more.items() if on)


def run(connection: Connection, case: Case, model_path: str, seed: int, setting: Setting) -> None:
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    from datasets import Dataset  # nothing else of this program should pay for these, or need them
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(case.threads)
    reporter = Reporter(connection, case.device)
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    fused = is_flash_attn_2_available() and case.device == "cuda"
    model = AutoModelForCausalLM.from_pretrained(
        model_path, dtype=getattr(torch, setting.weights), attn_implementation="flash_attention_2" if fused else "sdpa"
    )
    steps = shared.questions(case, tokenizer, seed)
    data = Dataset.from_list([{"prompt": [{"role": "user", "content": text}]} for texts in steps for text in texts])

    def short_words(completions: list[list[dict[str, str]]], **_: object) -> list[float]:
        rewards = [shared.reward(completion[0]["content"]) for completion in completions]
        reporter.step.reward = statistics.fmean(rewards)
        return rewards

    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder, seed=seed, use_cpu=case.device == "cpu", bf16=True, report_to="none", save_strategy="no", disable_tqdm=True,
            logging_steps=1000, shuffle_dataset=False, max_steps=case.steps, num_generations=case.samples,
            per_device_train_batch_size=setting.samples, gradient_accumulation_steps=case.batch // setting.samples,
            max_completion_length=case.new_tokens, temperature=1.0, top_p=1.0, top_k=0, beta=0.0, num_iterations=1,
            epsilon=shared.EPSILON, loss_type="dapo", scale_rewards="group", learning_rate=case.learning_rate,
            lr_scheduler_type="constant", optim="adamw_torch_fused", adam_beta1=shared.ADAMW["betas"][0],
            adam_beta2=shared.ADAMW["betas"][1], adam_epsilon=shared.ADAMW["eps"],
            weight_decay=shared.ADAMW["weight_decay"], max_grad_norm=shared.MAX_GRAD_NORM,
            gradient_checkpointing=setting.checkpointing, use_liger_kernel=setting.liger,
            use_transformers_continuous_batching=setting.continuous_batching,
            transformers_continuous_batching_config=PAGED if setting.continuous_batching else None,
        )  # fmt: skip
        trainer = GRPOTrainer(model, short_words, config, train_dataset=data, processing_class=tokenizer)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(_Held(reporter))
        prompts, _, _ = trainer._tokenize_prompts(list(data["prompt"]))
        size = 4 if setting.weights == "float32" else 2
        state = 4 * size * sum(parameter.numel() for parameter in model.parameters())
        grouped = [prompts[start : start + case.prompts] for start in range(0, len(prompts), case.prompts)]
        _clock(trainer, reporter)
        more = {"attention": model.config._attn_implementation}
        reporter.hello(
            Hello(asdict(setting) | more | {"optimiser": "adamw_torch_fused", "loss_type": "dapo"}, state, grouped)
        )
        trainer.train()


class _Held(TrainerCallback):
    """Each step waits for the word and reports when done; the word for the end stops the training."""

    def __init__(self, reporter: Reporter) -> None:
        self.reporter = reporter

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        if not self.reporter.wait():
            raise SystemExit

    def on_step_end(self, args, state, control, **kwargs):
        self.reporter.done()


def _clock(trainer, reporter: Reporter) -> None:
    """Puts the clock around the trainer's methods."""
    generate = trainer._generate_single_turn

    def generated(*args: object, **kwargs: object):
        completions, logprobs = generate(*args, **kwargs)
        reporter.step.tokens = sum(map(len, completions))
        return completions, logprobs

    loss = trainer.compute_loss

    def compute_loss(model, inputs, *args: object, **kwargs: object):
        reporter.step.rows += inputs["prompt_ids"].numel() + inputs["completion_ids"].numel()
        return loss(model, inputs, *args, **kwargs)

    create = trainer.create_optimizer

    def create_optimizer(*args: object, **kwargs: object):
        optimizer = create(*args, **kwargs)
        started: list[float] = []
        optimizer.register_step_pre_hook(lambda *_: started.append(reporter.now()))
        optimizer.register_step_post_hook(
            lambda *_: reporter.step.phases.update({"update/optimizer": reporter.now() - started.pop()})
        )
        return optimizer

    trainer._generate_single_turn = generated
    trainer._generate = reporter.timed("generate", trainer._generate)
    trainer._calculate_rewards = reporter.timed("reward", trainer._calculate_rewards)
    trainer.compute_loss = reporter.timed("update/loss", compute_loss)
    trainer.accelerator.backward = reporter.timed("update/backward", trainer.accelerator.backward)
    trainer.create_optimizer = create_optimizer
