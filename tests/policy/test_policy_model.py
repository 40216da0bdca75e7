"""Loading models: names, folders, templates, the shared cache folder."""

from __future__ import annotations

import errno
import json
import threading
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from omni_fast.errors import RunError, UserError
from omni_fast.policy import smollm2
from omni_fast.policy.cache import cached
from omni_fast.policy.model import chat_tokens, load, stop_tokens

TEMPLATE = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def write_model(folder: Path, template: str | None) -> None:
    letters = [chr(code) for code in range(32, 127)] + ["\n", "[end]"]
    core = Tokenizer(models.WordLevel({letter: index for index, letter in enumerate(letters)}, unk_token="?"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="[end]")
    tokenizer.chat_template = template
    config = LlamaConfig(
        vocab_size=len(letters), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, eos_token_id=len(letters) - 1, bos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def test_local_folder_loads_and_builds_prompts(tmp_path: Path) -> None:
    write_model(tmp_path / "m", TEMPLATE)
    model, tokenizer = load(str(tmp_path / "m"), dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16 and not model.training
    tokens = chat_tokens(tokenizer, "be brief", "2+2?", "= ")
    assert str(tokenizer.decode(tokens)).replace(" ", "") == "<system>bebrief\n<user>2+2?\n<assistant>="
    assert "<system>" not in str(tokenizer.decode(chat_tokens(tokenizer, "", "2+2?", ""))).replace(" ", "")
    assert stop_tokens(model, tokenizer) == (tokenizer.eos_token_id,)


def test_model_without_chat_template_is_a_users_mistake(tmp_path: Path) -> None:
    write_model(tmp_path / "m", None)
    with pytest.raises(UserError, match=r"no chat template.*chat_template\.jinja"):
        load(str(tmp_path / "m"), dtype=torch.float32)


@pytest.mark.parametrize("name", ["/no/such/model", "./nothing-here", "~/nowhere/at/all"])
def test_missing_folder(name: str) -> None:
    with pytest.raises(UserError, match="no model folder"):
        load(name, dtype=torch.float32)


def test_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no config\.json"):
        load(str(tmp_path), dtype=torch.float32)


def test_folder_with_broken_weights(tmp_path: Path) -> None:
    write_model(tmp_path / "m", TEMPLATE)
    (tmp_path / "m" / "model.safetensors").unlink()
    with pytest.raises(UserError, match="cannot be loaded"):
        load(str(tmp_path / "m"), dtype=torch.float32)


def test_template_that_refuses_a_system_message(tmp_path: Path) -> None:
    write_model(
        tmp_path / "m", "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}x"
    )
    _, tokenizer = load(str(tmp_path / "m"), dtype=torch.float32)
    with pytest.raises(UserError, match="no system role"):
        chat_tokens(tokenizer, "be brief", "2+2?", "")


def test_cache_builds_once_for_many_and_leaves_nothing_of_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMNI_FAST_HOME", str(tmp_path / "home"))
    built: list[Path] = []

    def fail(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise RunError("stopped in the middle")

    def build(folder: Path) -> None:
        built.append(folder)
        (folder / "value").write_text(json.dumps(1))

    with pytest.raises(RunError, match="in the middle"):
        cached("thing", fail)
    assert not [path for path in (tmp_path / "home").iterdir() if path.is_dir()]
    threads = [threading.Thread(target=cached, args=("thing", build)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(built) == 1
    assert (cached("thing", build) / "value").read_text() == "1"


def test_a_full_disk_under_the_cache_names_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMNI_FAST_HOME", str(tmp_path))

    def fail(folder: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(RunError, match="No space left on device.*OMNI_FAST_HOME"):
        cached("thing", fail)


def test_cache_folder_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("OMNI_FAST_HOME", str(tmp_path / "file" / "home"))
    with pytest.raises(UserError, match="OMNI_FAST_HOME"):
        cached("thing", lambda folder: None)


def test_wrong_bytes_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"not the model")
    with pytest.raises(RunError, match="not the file that was tested"):
        smollm2._check(tmp_path / "x.gguf", smollm2.GGUF_SHA256)
