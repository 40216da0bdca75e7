"""The from-scratch model: tokenizer, size, seeding, what a warm-up leaves to learn."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from omni_fast.policy.model import chat_tokens, stop_tokens
from omni_fast.policy.tiny import tiny_model

ROWS = [(f"{a}+{b}=", str(a + b), str((a + b + 1) % 10)) for a in range(4) for b in range(4)]
Built = tuple[PreTrainedModel, PreTrainedTokenizerBase]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def built(home: Path) -> Built:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMNI_FAST_HOME", str(home))
        return tiny_model(ROWS, seed=0, steps=60)


def test_it_is_small_and_ends_its_turn(built: Built) -> None:
    model, tokenizer = built
    assert sum(parameter.numel() for parameter in model.parameters()) < 1_000_000
    assert stop_tokens(model, tokenizer) == (tokenizer.eos_token_id,)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


@given(text=st.text(max_size=40))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_survives_the_tokenizer(built: Built, text: str) -> None:
    tokenizer = built[1]
    if not any(token in text for token in tokenizer.all_special_tokens):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_warm_up_knows_the_form_and_is_right_half_of_the_time(built: Built) -> None:
    model, tokenizer = built
    right, wrong, other = 0.0, 0.0, 0.0
    for prompt, reply, bad in ROWS:
        tokens = chat_tokens(tokenizer, "", prompt, "")
        with torch.no_grad():
            first = model(input_ids=torch.tensor([tokens])).logits[0, -1].softmax(-1)
        shown = {text: first[tokenizer.encode(text)[0]].item() for text in (reply, bad)}
        right += shown[reply] / len(ROWS)
        wrong += shown[bad] / len(ROWS)
        other += (1 - sum(shown.values())) / len(ROWS)
    assert 0.2 < right < 0.8 and 0.2 < wrong < 0.8 and other < 0.3


def test_same_arguments_same_model_from_the_cache(built: Built, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMNI_FAST_HOME", str(home))
    again, _ = tiny_model(ROWS, seed=0, steps=60)
    for (name, value), (_, other) in zip(built[0].named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(value, other), name
    assert len([path for path in home.iterdir() if path.is_dir()]) == 1
    tiny_model(ROWS, seed=1, steps=1)
    assert len([path for path in home.iterdir() if path.is_dir()]) == 2


def test_no_demonstrations() -> None:
    with pytest.raises(ValueError, match="demonstrations"):
        tiny_model([], seed=0)
