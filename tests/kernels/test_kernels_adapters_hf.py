"""Patched Hugging Face models against their own logits: values, gradients, generation, and what is refused."""

from __future__ import annotations

import copy
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    PhiConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    T5Config,
    T5ForConditionalGeneration,
)

from omni_kernels import IGNORE, reference
from omni_kernels.adapters.hf import patch_lm_head

EXAMPLE = Path(__file__).parents[2] / "examples" / "embed_hf.py"
COMMON = {
    "vocab_size": 101, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0, "initializer_range": 0.3,
}  # fmt: skip
MODELS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**COMMON),
    "qwen3, tied": Qwen3Config(**COMMON, head_dim=16, tie_word_embeddings=True),
    "gemma2, softcap": Gemma2Config(**COMMON, head_dim=16, final_logit_softcapping=2.0),
    "cohere, scale": CohereConfig(**COMMON, logit_scale=0.25),
    "granite, divisor": GraniteConfig(**COMMON, logits_scaling=4.0),
    "phi, bias": PhiConfig(**COMMON | {"num_key_value_heads": 2}),
}  # fmt: skip


def build(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MODELS[name]).eval()
    bias = model.get_output_embeddings().bias
    if bias is not None:
        nn.init.normal_(bias)
    return model


def tokens() -> tuple[Tensor, Tensor]:
    """(tokens [2, 9], labels): a prompt of 3 and some tokens in the middle are not scored."""
    ids = torch.randint(0, 101, (2, 9), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, :3], labels[1, 5] = IGNORE, IGNORE
    return ids, labels


def loss_of(logp: Tensor, entropy: Tensor) -> Tensor:
    return (logp * torch.linspace(-1, 1, logp.numel()).view_as(logp)).sum() + 0.1 * entropy.sum()


def gradients(model: PreTrainedModel) -> Tensor:
    found = torch.cat(
        [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in model.parameters()]
    )
    model.zero_grad()
    return found


def expected(model: PreTrainedModel, ids: Tensor, labels: Tensor, inverse: float) -> tuple[Tensor, Tensor]:
    """(logp, entropy) [B, L] aligned with labels, from the model's logits."""
    logits = model(ids).logits[:, :-1]
    logp, entropy, _ = reference.logprob(logits.flatten(0, 1), labels[:, 1:].flatten(), inverse)
    return tuple(nn.functional.pad(v.view(len(ids), -1), (1, 0)) for v in (logp, entropy))


def close(mine: Tensor, theirs: Tensor, rel: float = 2e-6) -> None:
    assert float((mine.double() - theirs.double()).norm()) <= rel * (1 + float(theirs.double().norm()))


@pytest.mark.parametrize("name", MODELS)
def test_values_and_gradients_are_those_of_the_logits(name: str) -> None:
    model, (ids, labels) = build(name), tokens()
    logp, entropy = expected(model, ids, labels, 1 / 0.8)
    loss_of(logp, entropy).backward()
    theirs = gradients(model)
    assert theirs.norm() > 1
    with patch_lm_head(model):
        out = model(ids, labels=labels, inv_temperature=1 / 0.8)
    close(out.logp, logp), close(out.entropy, entropy)
    close(out.loss, -logp.sum() / (labels[:, 1:] != IGNORE).sum())
    loss_of(out.logp, out.entropy).backward()
    close(gradients(model), theirs, 1e-5)


def test_targets_and_a_temperature_per_token() -> None:
    model, (ids, labels) = build("llama"), tokens()
    inverse = 0.5 + torch.rand(labels.shape)
    shifted = torch.cat([labels[:, 1:], torch.full((2, 1), IGNORE)], 1)
    patch_lm_head(model)
    by_label = model(ids, labels=labels, inv_temperature=inverse)
    by_target = model(ids, targets=shifted, inv_temperature=inverse.roll(-1, 1), num_items_in_batch=5)
    assert torch.equal(by_label.logp[:, 1:], by_target.logp[:, :-1])
    assert float(by_target.loss.detach()) == pytest.approx(-float(by_target.logp.detach().sum()) / 5)
    plain = model(ids, labels=labels)
    assert not torch.allclose(plain.logp, by_label.logp)


def test_without_labels_it_is_the_old_model_and_undo_brings_it_back() -> None:
    model, (ids, labels) = build("gemma2, softcap"), tokens()
    logits, loss = model(ids).logits, model(ids, labels=labels).loss
    continued = model.generate(ids, max_new_tokens=4, do_sample=False)
    with patch_lm_head(model) as patch:
        assert torch.equal(model(ids).logits, logits)
        assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), continued)
        close(model(ids, labels=labels).loss, loss)
        assert "logits" not in model(ids, labels=labels)
    assert "forward" not in vars(model)
    assert torch.equal(model(ids, labels=labels).logits, logits)
    patch.undo()


def test_a_copy_is_scored_by_its_own_weights() -> None:
    """As references are made: what a copy of a patched model computes is the copy's."""
    model, (ids, labels) = build("llama"), tokens()
    patch_lm_head(model)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for weight in copied.parameters():
            weight.mul_(1.5)
    plain = build("llama")
    plain.load_state_dict(copied.state_dict())
    assert torch.equal(copied(ids).logits, plain(ids).logits)
    close(copied(ids, labels=labels).logp, expected(plain, ids, labels, 1.0)[0])
    close(model(ids, labels=labels).logp, expected(build("llama"), ids, labels, 1.0)[0])


def test_what_does_not_fit_is_named() -> None:
    model, (ids, labels) = build("llama"), tokens()
    patch_lm_head(model)
    with pytest.raises(ValueError, match=r"inv_temperature is \[9\]; give a number, or \[2, 9\]"):
        model(ids, labels=labels, inv_temperature=torch.ones(9))
    assert torch.equal(model(ids, labels=labels, return_dict=False).loss, model(ids, labels=labels).loss)


def test_no_logits_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (ids, labels) = build("llama"), tokens()
    patch_lm_head(model)
    monkeypatch.setattr(model.lm_head, "forward", lambda *_: pytest.fail("the head was called"))
    assert torch.isfinite(model(ids, labels=labels).loss)


def test_a_frozen_head_gets_no_gradient_and_a_lora_model_trains() -> None:
    peft = pytest.importorskip("peft")
    model, (ids, labels) = build("llama"), tokens()
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    patch_lm_head(adapted.get_base_model())
    adapted(input_ids=ids, labels=labels).loss.backward()
    assert model.lm_head.weight.grad is None
    assert any(p.grad is not None and p.grad.norm() > 0 for p in adapted.parameters() if p.requires_grad)


def test_torch_compile_sees_one_graph() -> None:
    model, (ids, labels) = build("qwen3, tied"), tokens()
    patch_lm_head(model)
    found = []
    for call in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        out = call(input_ids=ids, labels=labels)
        loss_of(out.logp, out.entropy).backward()
        found.append((out.logp.detach(), gradients(model)))
    close(found[1][0], found[0][0]), close(found[1][1], found[0][1])


def test_autocast_is_that_of_the_model() -> None:
    model, (ids, labels) = build("llama"), tokens()
    with torch.autocast("cpu", torch.bfloat16):
        logp, _ = expected(model, ids, labels, 1.0)
        with patch_lm_head(model):
            out = model(ids, labels=labels)
    assert out.logp.dtype == torch.float32
    close(out.logp, logp, 1e-5)  # bf16 logits on both sides
    assert float((logp - expected(model, ids, labels, 1.0)[0]).norm()) > 1e-3


def test_what_cannot_be_read_is_refused() -> None:
    model, (ids, labels) = build("llama"), tokens()
    hook = model.lm_head.register_forward_hook(lambda *a: a[-1] * 0.9)
    with pytest.raises(ValueError, match="makes its logits in a way unknown here"):
        patch_lm_head(model)
    hook.remove()
    assert "forward" not in vars(model)
    with pytest.raises(ValueError, match="give one of them"), patch_lm_head(model):
        model(ids, labels=labels, targets=labels)
    with pytest.raises(ValueError, match=r"targets is \[2, 8\]; give \[2, 9\]"), patch_lm_head(model):
        model(ids, targets=labels[:, 1:])
    model.lm_head = nn.Sequential(model.lm_head)
    with pytest.raises(ValueError, match="the head of LlamaForCausalLM is Sequential"):
        patch_lm_head(model)
    small = T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0)
    with pytest.raises(ValueError, match="encoder-decoder"):
        patch_lm_head(T5ForConditionalGeneration(small))


def test_a_missing_transformers_is_named() -> None:
    code = "import sys; sys.modules['transformers'] = None\nimport omni_kernels.adapters.hf"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "ImportError: omni_kernels.adapters.hf needs transformers (tried with 5.23.0)" in done.stderr


def test_the_example_learns(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), "--steps", "10"])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    words = capsys.readouterr().out.splitlines()[-1].split()
    assert float(words[7]) > float(words[2]) + 0.1, words
