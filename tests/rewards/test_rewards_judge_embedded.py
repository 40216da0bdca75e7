"""The embedded judge on small real encoders: fitting, the bar, verdicts, persistence. SmolLM2 itself is in tests/real."""

import os
import random
import subprocess
import sys
import zlib
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from omni_fast.errors import UserError
from omni_fast.rewards.judge.base import Reply
from omni_fast.rewards.judge.corrupt import FAMILIES, make_pairs
from omni_fast.rewards.judge.embedded import EmbeddedJudge, Head, Report, fit_head, fit_preference, roc_auc
from omni_fast.rewards.judge.encode import pooled_encoder
from omni_fast.rewards.judge.features import FEATURES, features
from omni_fast.rewards.judge.sentences import prompt_text, random_prompt, reference_sentence
from omni_fast.rewards.text_checks import words


def bigrams(texts: Sequence[str]) -> torch.Tensor:
    """A hashed bag of word pairs: weak, deterministic, and a real function of the text."""
    result = torch.zeros(len(texts), 256)
    for row, text in enumerate(texts):
        tokens = ["<", *words(text), ">"]
        for left, right in zip(tokens, tokens[1:], strict=False):
            result[row, zlib.crc32(f"{left} {right}".encode()) % 256] += 1.0 / len(tokens)
    return result


def blind(texts: Sequence[str]) -> torch.Tensor:
    return torch.zeros(len(texts), 4)


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    letters = {ch: i + 1 for i, ch in enumerate("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ .,'")}
    base = Tokenizer(models.WordLevel({"?": 0} | letters, unk_token="?"))
    base.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=256,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval(), PreTrainedTokenizerFast(tokenizer_object=base, unk_token="?")


def reply(text: str, reference: str = "The quiet cat dreamed of the moon and the river.") -> Reply:
    prompt = "Write one sentence about a cat that uses the words moon and river."
    return Reply(prompt, text, reference, ("moon", "river"))


def test_pairs_are_length_matched_and_every_family_is_there():
    pairs = make_pairs(8, seed=5)
    assert {pair.family for pair in pairs} == set(FAMILIES) and len(pairs) == 8 * len(FAMILIES)
    assert all(
        abs(len(p.reply.completion.split()) - len(p.reply.reference.split())) <= 1
        and p.reply.completion != p.reply.reference
        for p in pairs
    )
    assert pairs == make_pairs(8, seed=5) != make_pairs(8, seed=6)


def test_newton_finds_the_minimum():
    rng = np.random.default_rng(0)
    difference = rng.normal(size=(80, 6)) + np.array([1.0, -1.0, 0, 0, 0, 0])
    w = fit_preference(difference, ridge=0.1)
    gradient = 0.1 * w - difference.T @ (1 / (1 + np.exp(difference @ w))) / 80
    assert np.abs(gradient).max() < 1e-6 and w[0] > 0 > w[1]


def test_auc_counts_ties_half():
    assert roc_auc(np.array([2.0, 3.0]), np.array([0.0, 1.0])) == 1.0
    assert roc_auc(np.array([1.0]), np.array([1.0])) == 0.5


def test_a_blind_encoder_misses_the_bar_and_the_rubric_judges():
    judge = EmbeddedJudge(blind, fit_head(blind))
    assert not judge.usable and judge.name.startswith("rubric checks alone")
    good = judge.judge([reply("The cat watched the moon rise over the quiet river.")])[0]
    assert good.value == 1.0


def test_fit_is_deterministic_and_survives_the_disk(tmp_path):
    judge = EmbeddedJudge(bigrams, fit_head(bigrams, 1))
    again = EmbeddedJudge(bigrams, fit_head(bigrams, 1))
    assert judge.head.w_hidden == again.head.w_hidden and judge.head.report.auc == again.head.report.auc
    judge.head.save(tmp_path / "head.json")
    assert Head.load(tmp_path / "head.json") == judge.head
    for text in ("{}", "not json", '{"format": 1, "features": []}'):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(UserError, match="fitted again"):
            Head.load(tmp_path / "bad.json")


def test_verdicts_against_the_reference():
    head = fit_head(bigrams)
    good = Report({"any": 1.0}, hacks=100, hacks_accepted=0, pairs=1, seconds=0.0)
    judge = EmbeddedJudge(bigrams, Head(head.w_hidden, head.w_features, head.spread, head.gap, good))
    assert judge.usable
    same = reply("The quiet cat dreamed of the moon and the river.")
    parts = judge.judge([same, reply(""), reply("Solution: moon river cat and more."), reply("the the the moon river")])
    assert [part.value for part in parts] == [1.0, 0.0, 0.0, 0.0]
    assert [part.reason for part in parts[1:3]] == ["empty", "master_key"]
    assert [part.reason for part in judge.judge([reply("Stone of purple it ate running window the was and")])] == [
        "loss"
    ]
    twice = [reply("The cat saw a moon and some river that it"), reply("My cat left the river when a moon was up.")] * 5
    values = [part.value for part in judge.judge(twice)]
    assert values == values[:2] * 5 and values[0] != values[1], "equal texts are worth exactly the same, others are not"
    thought = reply(f"<think>A cat, a moon, a river.</think> {twice[0].completion}")
    assert judge.judge([thought])[0].value == values[0]
    assert judge.judge([]) == []


def test_the_bar():
    def report(auc: dict[str, float], accepted: int) -> bool:
        return Report(auc, 200, accepted, 1, 0.0).usable

    assert report({"a": 0.9, "b": 0.8}, 4)
    assert not report({"a": 0.9, "b": 0.8}, 5), "more than 2 % of the hacks"
    assert not report({"a": 1.0, "b": 1.0, "c": 0.69}, 0), "one family below 0.70"
    assert not report({"a": 0.84, "b": 0.85}, 0), "mean below 0.85"


def test_features_are_bounded_and_blind_to_length():
    rng = random.Random(0)
    for _ in range(100):
        topic, required = random_prompt(rng)
        prompt, text = prompt_text(topic, required), reference_sentence(topic, required, rng)
        values = features(prompt, text, required)
        assert tuple(values) == FEATURES and all(0.0 <= value <= 1.0 for value in values.values())
    assert all(0.0 <= value <= 1.0 for value in features("", "", ()).values())


def test_encoder_is_frozen_and_independent_of_padding(tiny):
    model, tokenizer = tiny
    encode = pooled_encoder(model, tokenizer, layers=2)
    texts = ["A cat sat.", "The moon rose over the quiet river and nobody saw it.", ""]
    together = encode(texts)
    assert together.shape == (3, 32) and not together[2].any()
    assert len(model.model.layers) == 3 and model.config.num_hidden_layers == 3, "the model keeps its layers"
    alone = torch.cat([encode([text]) for text in texts])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.add_(1.0)
    torch.testing.assert_close(encode(texts), together)


@pytest.mark.parametrize(
    "text", ["\ud800 the moon and a river met the cat again", "\x00\x01 cat", "cat " * 5000, "🙂" * 50]
)
def test_hostile_text_never_raises(tiny, text):
    model, tokenizer = tiny
    encode = pooled_encoder(model, tokenizer, layers=1)
    judge = EmbeddedJudge(encode, fit_head(encode))
    head = judge.head
    good = Report({"any": 1.0}, hacks=100, hacks_accepted=0, pairs=1, seconds=0.0)
    judge = EmbeddedJudge(judge.encode, Head(head.w_hidden, head.w_features, head.spread, head.gap, good))
    assert judge.judge([reply(text)])[0].valid


def test_pairs_do_not_depend_on_the_process() -> None:
    """Sets of strings have another order in each process: a head fitted on them would be another one."""
    code = "from omni_fast.rewards.judge.corrupt import make_pairs; print(make_pairs(60, 0))"
    made = {
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(made) == 1
