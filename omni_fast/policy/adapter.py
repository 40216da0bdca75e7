"""LoRA through peft: the adapter is put into the model in place, so whoever shares the model sees it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from transformers import PreTrainedModel


def add_adapter(model: PreTrainedModel, rank: int, alpha: float) -> None:
    """Freezes `model` and adds a trainable adapter of that rank to every linear layer but the head (LoRA, 2106.09685)."""
    from peft import LoraConfig, inject_adapter_in_model  # which takes its time

    model.requires_grad_(False)
    settings = LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM")
    settings.base_model_name_or_path = model.name_or_path
    settings.lora_alpha = alpha  # type: ignore[assignment]  # declared int, used as a number
    inject_adapter_in_model(settings, model)


def save_adapter(model: PreTrainedModel, folder: Path) -> None:
    """The adapter alone in an existing folder, in peft's layout, as SGLang loads it."""
    kept = {
        f"base_model.model.{name.replace('.default.', '.')}": value.detach().cpu().contiguous()
        for name, value in model.named_parameters()
        if ".lora_" in name
    }
    save_file(kept, folder / "adapter_model.safetensors", {"format": "pt"})
    model.peft_config["default"].save_pretrained(str(folder))


@contextmanager
def without_adapter(model: PreTrainedModel) -> Iterator[None]:
    """The base model while inside; nothing changes for a model without adapter."""
    adapted = model.modules() if hasattr(model, "peft_config") else ()
    layers: list[Any] = [module for module in adapted if hasattr(module, "get_delta_weight")]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
