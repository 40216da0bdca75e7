"""The local engine against transformers' own generate and forward, and its promises about seeds and order."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from omni_fast.errors import UserError
from omni_fast.rollout import local
from omni_fast.rollout.engine import Prompt, Sample, Sampling
from omni_fast.rollout.local import LocalEngine
from omni_fast.rollout.shared_cache import PackedLinear, common_length
from omni_kernels import decoder

SIZES = dict(
    vocab_size=517,  # not a multiple of anything that the code likes
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    initializer_range=0.3,  # peaked enough that greedy has no near ties
)
KINDS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=False)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, tie_word_embeddings=False)),
    "windows": lambda: Qwen2ForCausalLM(
        Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=8, max_window_layers=1)
    ),
}
COMPILED = ("llama", "qwen2", "qwen3")
NEEDS_GPU = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"))
DEVICES = ["cpu", pytest.param("cuda", marks=NEEDS_GPU)]


@pytest.fixture(params=[*KINDS, "llama by its modules"])
def model(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> PreTrainedModel:
    if request.param not in KINDS:
        monkeypatch.setattr(local, "fits", lambda model: False)
    torch.manual_seed(7)
    made = KINDS[request.param.split()[0]]().eval()
    made.generation_config.eos_token_id = None
    with torch.no_grad():  # biases and norms that are not the identity
        for name, parameter in made.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter) * (1 + name.endswith("bias")))
    return made


def some_prompts(common: int = 0) -> list[Prompt]:
    """Five prompts of different lengths whose first `common` tokens are the same."""
    generator = torch.Generator().manual_seed(3)
    first = torch.randint(517, (common,), generator=generator).tolist()
    return [
        Prompt(first + torch.randint(517, (length,), generator=generator).tolist(), key=100 + number)
        for number, length in enumerate((5, 11, 1, 8, 5))
    ]


def token_lists(results: list[list[Sample]]) -> list[list[list[int]]]:
    return [[sample.tokens for sample in samples] for samples in results]


@pytest.mark.parametrize("common", [0, 1, 9])
@pytest.mark.parametrize("device", DEVICES)
def test_greedy_is_transformers_generate(model: PreTrainedModel, device: str, common: int) -> None:
    model.to(device)
    prompts = some_prompts(common)
    results = LocalEngine(model).generate(prompts, 2, Sampling(12, temperature=0.0))
    for prompt, samples in zip(prompts, results, strict=True):
        expected = model.generate(torch.tensor([prompt.tokens], device=device), max_new_tokens=12, do_sample=False)
        for sample in samples:
            assert sample.tokens == expected[0, len(prompt.tokens) :].tolist()
            assert sample.finish_reason == "length"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_logprobs_are_those_of_a_forward_pass(model: PreTrainedModel, temperature: float, device: str) -> None:
    model.to(device)
    prompts = some_prompts()
    for prompt, samples in zip(
        prompts, LocalEngine(model).generate(prompts, 3, Sampling(9, temperature, seed=1)), strict=True
    ):
        for sample in samples:
            ids = torch.tensor([[*prompt.tokens, *sample.tokens]], device=device)
            with torch.no_grad():
                logits = model(ids).logits[0, len(prompt.tokens) - 1 : -1].double() / (temperature or 1.0)
            expected = logits.log_softmax(-1).gather(1, ids[0, len(prompt.tokens) :, None])[:, 0]
            torch.testing.assert_close(
                torch.tensor(sample.logprobs, dtype=torch.float64), expected.cpu(), atol=1e-4, rtol=0
            )


@pytest.mark.parametrize("common", [0, 7])
def test_a_draw_depends_on_nothing_else_in_the_batch(model: PreTrainedModel, common: int) -> None:
    prompts = some_prompts(common)
    sampling = Sampling(10, temperature=1.0, seed=11)
    together = token_lists(LocalEngine(model).generate(prompts, 4, sampling))
    assert len({tuple(tokens) for tokens in together[0]}) == 4, "samples of one prompt must differ"
    engine = LocalEngine(model)
    assert token_lists(engine.generate(prompts[::-1], 4, sampling)) == together[::-1]
    for prompt, expected in zip(prompts, together, strict=True):
        assert token_lists(engine.generate([prompt], 1, sampling)) == [expected[:1]]
    # Waves of at most three rows split groups; a small token bound splits them elsewhere.
    assert token_lists(LocalEngine(model, max_rows=3).generate(prompts, 4, sampling)) == together
    assert token_lists(LocalEngine(model, tokens_in_flight=40).generate(prompts, 4, sampling)) == together
    assert token_lists(engine.generate(prompts, 4, Sampling(10, seed=12))) != together
    shorter = token_lists(engine.generate(prompts, 4, Sampling(6, seed=11)))
    assert shorter == [[tokens[:6] for tokens in samples] for samples in together]


def test_a_stop_token_ends_its_row_alone(model: PreTrainedModel) -> None:
    prompts = some_prompts()
    engine = LocalEngine(model)
    free = engine.generate(prompts, 8, Sampling(30, seed=5))
    # Frequent tokens as stops, so that rows leave at many different steps.
    stops = tuple(range(0, 517, 13))
    stopped = engine.generate(prompts, 8, Sampling(30, seed=5, stop_token_ids=stops))
    reasons = set()
    for before, after in zip(sum(free, []), sum(stopped, []), strict=True):
        ends = [place for place, token in enumerate(before.tokens) if token in stops]
        length = ends[0] + 1 if ends else 30
        assert after.tokens == before.tokens[:length]
        torch.testing.assert_close(after.logprobs, before.logprobs[:length], atol=1e-4, rtol=0)
        assert after.finish_reason == ("stop" if ends else "length")
        assert after.versions == [(0, 0, length)]
        reasons.add(after.finish_reason)
    assert reasons == {"stop", "length"}


def test_progress_counts_every_token(model: PreTrainedModel) -> None:
    seen: list[tuple[int, int]] = []
    results = LocalEngine(model, max_rows=7).generate(
        some_prompts(), 2, Sampling(6, seed=2, stop_token_ids=tuple(range(0, 517, 5))), lambda *now: seen.append(now)
    )
    assert seen[-1] == (sum(len(sample.tokens) for samples in results for sample in samples), 0)
    assert all(b[0] > a[0] and b[1] <= a[1] for a, b in zip(seen, seen[1:], strict=False))


def test_sync_takes_the_new_weights_and_not_before(model: PreTrainedModel) -> None:
    prompts, greedy = some_prompts(), Sampling(8, temperature=0.0)
    engine = LocalEngine(model)
    before = token_lists(engine.generate(prompts, 1, greedy))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    engine.sync(3)
    after = engine.generate(prompts, 1, greedy)
    assert token_lists(after) == token_lists(LocalEngine(model).generate(prompts, 1, greedy)) != before
    assert all(sample.versions == [(3, 0, 8)] for samples in after for sample in samples)
    assert engine.version == 3


def test_an_adapter_put_in_later_is_taken_over(model: PreTrainedModel) -> None:
    peft = pytest.importorskip("peft")
    prompts, greedy = some_prompts(), Sampling(8, temperature=0.0)
    engine = LocalEngine(model)
    before = token_lists(engine.generate(prompts, 1, greedy))
    settings = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    peft.inject_adapter_in_model(settings, model)
    engine.sync(1)
    after = token_lists(engine.generate(prompts, 1, greedy))
    assert after != before
    for prompt, samples in zip(prompts, after, strict=True):
        expected = model.generate(torch.tensor([prompt.tokens]), max_new_tokens=8, do_sample=False)
        assert samples == [expected[0, len(prompt.tokens) :].tolist()]


def test_an_engine_goes_on_after_it_was_closed(model: PreTrainedModel) -> None:
    engine = LocalEngine(model)
    before = token_lists(engine.generate(some_prompts(), 1, Sampling(2)))
    engine.close()
    assert token_lists(engine.generate(some_prompts(), 1, Sampling(2))) == before
    engine.sync(2)
    assert token_lists(engine.generate(some_prompts(), 1, Sampling(2))) == before


def test_the_model_is_left_as_it_was(model: PreTrainedModel) -> None:
    model.train()
    names = [name for name, _ in model.named_modules()]
    implementation = model.config._attn_implementation
    LocalEngine(model).generate(some_prompts(), 1, Sampling(2))
    assert [name for name, _ in model.named_modules()] == names
    assert model.training and model.config._attn_implementation == implementation
    model(torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("changed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_sync_never_holds_packed_weights_twice(dtype: torch.dtype, changed: bool) -> None:
    model = heads_of_32("llama", dtype)
    engine = LocalEngine(model)
    if engine.packed is None:
        pytest.skip("the compiled kernels are not built")
    products = [product for layer in engine.packed.products for product in layer]
    held = [product.weight if product.packed is None else product.packed.panels for product in products]
    before = [weakref.ref(weight) for weight in held]
    assert len(before) == 12
    own = products[0].packed is not None
    del held
    if changed:
        peft = pytest.importorskip("peft")
        peft.inject_adapter_in_model(peft.LoraConfig(r=4, target_modules="all-linear"), model)
    gc.disable()
    try:
        engine.sync(1)
        assert all((weight() is not None) == own for weight in before), "written over, or gone"
    finally:
        gc.enable()


def test_bfloat16_stays_close_to_a_forward_pass(model: PreTrainedModel) -> None:
    model.to(torch.bfloat16)
    prompts = some_prompts()
    results = LocalEngine(model).generate(prompts, 8, Sampling(16, seed=4))
    errors = []
    for prompt, samples in zip(prompts, results, strict=True):
        for sample in samples:
            ids = torch.tensor([[*prompt.tokens, *sample.tokens]])
            with torch.no_grad():
                logits = model(ids).logits[0, len(prompt.tokens) - 1 : -1].double()
            expected = logits.log_softmax(-1).gather(1, ids[0, len(prompt.tokens) :, None])[:, 0]
            errors.append((torch.tensor(sample.logprobs) - expected).abs().mean())
    assert torch.stack(errors).mean() < 0.1


def test_the_same_prompt_twice_is_two_prompts(model: PreTrainedModel) -> None:
    tokens = some_prompts()[1].tokens
    twice = LocalEngine(model).generate([Prompt(tokens, 1), Prompt(tokens, 2)], 2, Sampling(9, seed=3))
    alone = LocalEngine(model).generate([Prompt(tokens, 2)], 2, Sampling(9, seed=3))
    assert token_lists(twice)[1:] == token_lists(alone) != token_lists(twice)[:1]


def test_the_common_beginning_leaves_each_prompt_a_token() -> None:
    assert common_length([[1, 2, 3]]) == 0
    assert common_length([[1, 2, 3], [1, 2, 3]]) == 2
    assert common_length([[1, 2, 3], [1, 2], [1, 2, 4, 5]]) == 1
    assert common_length([[1, 2, 3, 9], [1, 2, 7, 9], [1, 2, 3, 4, 5]]) == 2
    assert common_length([[3, 2], [1, 2]]) == 0


def test_no_prompts_give_no_samples(model: PreTrainedModel) -> None:
    assert LocalEngine(model).generate([], 4, Sampling(8)) == []


@pytest.mark.parametrize(
    ("length", "words"),
    [(57, "lower the task's max_new_tokens"), (0, "no tokens")],
)
def test_a_prompt_that_does_not_fit_is_the_users_error(model: PreTrainedModel, length: int, words: str) -> None:
    prompts = [Prompt([1, 2], 0), Prompt([1] * length, 1)]
    with pytest.raises(UserError, match=words) as caught:
        LocalEngine(model).generate(prompts, 1, Sampling(8))
    assert "prompt 1" in str(caught.value)


def test_a_sample_above_the_bound_on_the_cache_runs_alone(model: PreTrainedModel) -> None:
    """No setting of a run could raise it."""
    prompts, sampling = some_prompts(), Sampling(20, seed=1)
    alone = LocalEngine(model, tokens_in_flight=10).generate(prompts, 2, sampling)
    assert token_lists(alone) == token_lists(LocalEngine(model).generate(prompts, 2, sampling))


def heads_of_32(kind: str, dtype: torch.dtype) -> PreTrainedModel:
    """A model whose heads the compiled decoding takes, with many prompts' worth of context."""
    torch.manual_seed(0)
    sizes = SIZES | dict(
        vocab_size=300, hidden_size=128, intermediate_size=96, num_attention_heads=4, head_dim=32,
        max_position_embeddings=512, initializer_range=0.1,
    )  # fmt: skip
    configs = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
    classes = {"llama": LlamaForCausalLM, "qwen2": Qwen2ForCausalLM, "qwen3": Qwen3ForCausalLM}
    return classes[kind](configs[kind](**sizes)).to(dtype).eval()


@pytest.mark.parametrize("kind", COMPILED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_shared_cache_gives_what_the_modules_give(dtype: torch.dtype, kind: str) -> None:
    """Log-probs of the same tokens; prompts with and without a common beginning, rows that stop on the way."""
    model = heads_of_32(kind, dtype)
    engine = LocalEngine(model)
    if engine.packed is None:
        assert not decoder.native(torch.zeros(1))
        pytest.skip("the compiled kernels are not built")
    draw = torch.Generator().manual_seed(3)
    texts = [torch.randint(0, 300, (length,), generator=draw).tolist() for length in (1, 5, 40, 130)]
    for prompts in (texts, [[7, 8, 9, *text] for text in texts], texts[:1]):
        asked = [Prompt(text, number) for number, text in enumerate(prompts)]
        groups = engine.generate(asked, 5, Sampling(20, 1.0, tuple(range(20)), 1))
        assert len({len(sample.tokens) for group in groups for sample in group}) > 1
        for text, group in zip(prompts, groups, strict=True):
            for sample in group:
                with torch.no_grad():
                    logits = model(torch.tensor([text + sample.tokens[:-1]])).logits[0, len(text) - 1 :].float()
                exact = logits.log_softmax(-1).gather(1, torch.tensor(sample.tokens)[:, None])[:, 0]
                error = (torch.tensor(sample.logprobs) - exact).abs().max()
                assert error < (1e-4 if dtype == torch.float32 else 0.3), f"{error:.3g}"


@pytest.mark.parametrize("then", [torch.bfloat16, torch.float32])
def test_weights_of_another_dtype_replace_the_packed_ones(then: torch.dtype) -> None:
    torch.manual_seed(7)
    model = KINDS["llama"]().to(torch.float32 if then == torch.bfloat16 else torch.bfloat16).eval()
    engine = LocalEngine(model)
    model.to(then)
    engine.sync(1)
    asked = ([Prompt([1, 2, 3], 0)], 2, Sampling(4, 1.0, (), 0))
    fresh = LocalEngine(model)
    assert [sample.tokens for sample in engine.generate(*asked)[0]] == [s.tokens for s in fresh.generate(*asked)[0]]
    layer, linear = PackedLinear(), torch.nn.Linear(64, 96)
    for dtype in (model.dtype, torch.bfloat16, torch.float32):
        layer.read(linear.to(dtype))
        assert (layer.packed is None) != (layer.weight is None), "one of them, never both"
