"""The in-process engine: generates with the policy's own weights, on CPU or one GPU, with nothing to start.

Each prompt is computed once, whatever the number of its samples; rows then decode in lockstep and leave the batch as they
finish. What would not fit the memory bound runs as several waves, prompts of like length together. Draws depend on (seed,
prompt key, sample number, token number) and the row's own probabilities alone; log-probs are those of the distribution
sampled from, computed from the logits in float32.

Limits: in bf16 the rounding of a product may depend on the number of rows, so that a draw on the edge of two tokens can
differ between batches.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from omni_fast.errors import UserError
from omni_fast.rollout.decode import ModuleWave
from omni_fast.rollout.engine import Deferred, Engine, Finished, Progress, Prompt, Rollout, Sample, Sampling
from omni_fast.rollout.sampling import draw, uniforms
from omni_fast.rollout.shared_cache import PackedModel, SharedWave, fits

ROW_STEP = 8  # rows leave the batch in such steps: a new row count costs the GEMM library a new kernel


class LocalEngine(Engine):
    """Implements `Engine` over a model of transformers that stays in this process.

    The engine reads the parameters of `model` as they are at construction and at each `sync`; it never writes them.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        tokens_in_flight: int = 32_768,
        max_rows: int = 256,
        threads: int | None = None,
    ) -> None:
        """tokens_in_flight: bound on the cache, in tokens of prompt and completion over all rows of a wave of several.

        max_rows: bound on the rows of a wave. threads: CPU threads while generating (None: as the process has them).
        """
        self.model, self.threads = model, threads
        self.tokens_in_flight, self.max_rows = tokens_in_flight, max_rows
        self.packed: PackedModel | None = None
        self.sync(0)

    def sync(self, version: int) -> dict[str, float]:
        """Take over the model as it is now, adapters included; samples from now on carry `version`."""
        self.packed = (self.packed or PackedModel(self.model)) if fits(self.model) else None
        if self.packed is not None:
            self.packed.read()
        self.version = version
        return {}

    def close(self) -> None:
        """Give the packed weights back; until the next `sync` the model's modules generate."""
        self.packed = None

    def start(self, prompts: Sequence[Prompt], n: int, sampling: Sampling, arrived: Finished | None = None) -> Rollout:
        """Nothing is generated before it is waited for: policy and engine share the cores and the weights.

        arrived: called between two tokens with each prompt whose samples are all complete, so it must be quick. What waits
        gets UserError for a prompt without tokens, or one that does not fit with its new tokens.
        """
        return Deferred(lambda progress: self._generate(prompts, n, sampling, progress, arrived))

    def _generate(
        self, prompts: Sequence[Prompt], n: int, sampling: Sampling, progress: Progress | None, arrived: Finished | None
    ) -> list[list[Sample]]:
        for number, prompt in enumerate(prompts):
            self._check(number, len(prompt.tokens), sampling.max_new_tokens)
        results: list[list[Sample]] = [[Sample([], [], "length") for _ in range(n)] for _ in prompts]
        left = [n] * len(prompts)
        tokens = 0
        with torch.inference_mode(), _generating(self.model, self.threads):
            for wave in self._waves(prompts, n, sampling.max_new_tokens):
                for added, ended in self._run(prompts, wave, results, sampling):
                    tokens += added
                    for index in ended:
                        left[index] -= 1
                        if left[index] == 0:
                            for sample in results[index]:
                                sample.versions = [(self.version, 0, len(sample.tokens))]
                            if arrived is not None:
                                arrived(index, results[index])
                    if progress is not None:
                        progress(tokens, sum(left))
        return results

    def _check(self, number: int, length: int, new: int) -> None:
        limit = self.model.config.max_position_embeddings - new
        if length > limit:
            raise UserError(
                f"prompt {number} has {length} tokens and at most {limit} fit into the model's context beside {new} new ones: "
                "shorten the prompt, lower the task's max_new_tokens, or take a model with a longer context"
            )
        if length == 0:
            raise UserError(f"prompt {number} has no tokens: give each prompt at least one (a BOS token, for example)")

    def _waves(self, prompts: Sequence[Prompt], n: int, new: int) -> Iterator[list[tuple[int, int]]]:
        """(prompt, sample number) pairs that run together, by length of prompt, each wave within the bounds."""
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index].tokens))
        wave: list[tuple[int, int]] = []
        for index in order:
            columns = len(prompts[index].tokens) + new  # the longest so far
            for number in range(n):
                if wave and (len(wave) >= self.max_rows or (len(wave) + 1) * columns > self.tokens_in_flight):
                    yield wave
                    wave = []
                wave.append((index, number))
        if wave:
            yield wave

    def _run(
        self,
        prompts: Sequence[Prompt],
        members: list[tuple[int, int]],
        results: list[list[Sample]],
        sampling: Sampling,
    ) -> Iterator[tuple[int, list[int]]]:
        """Generate one wave into `results`; yields after each step the tokens added and the prompts of ended samples."""
        device = self.model.device
        samples = Counter(index for index, _ in members)
        texts, counts = [prompts[index].tokens for index in samples], list(samples.values())
        wave: SharedWave | ModuleWave
        if self.packed is None:
            wave = ModuleWave(self.model, texts, counts)
        else:
            wave = SharedWave(self.packed, texts, counts, sampling.max_new_tokens)
        limit, stops = sampling.max_new_tokens, frozenset(sampling.stop_token_ids)
        streams = [uniforms(sampling.seed, prompts[index].key, number, limit) for index, number in members]
        uniform_RT = torch.stack(streams).to(device)
        rows = [(index, results[index][number]) for index, number in members]
        alive = [True] * len(rows)
        logits_RV = wave.prefill()[wave.prompt_of_row]
        for step in range(limit):
            token_R, logprob_R = draw(logits_RV, uniform_RT[:, step], sampling.temperature)
            added, ended = sum(alive), []
            for row, (token, logprob) in enumerate(zip(token_R.tolist(), logprob_R.tolist(), strict=True)):
                if alive[row]:
                    index, sample = rows[row]
                    sample.tokens.append(token)
                    sample.logprobs.append(logprob)
                    if token in stops:
                        sample.finish_reason = "stop"
                    if token in stops or step + 1 == limit:
                        alive[row] = False
                        ended.append(index)
            yield added, ended
            if not any(alive):
                return
            keep = _compaction(alive)
            if keep is not None:
                wave.keep(keep)
                rows, alive = [rows[row] for row in keep], [alive[row] for row in keep]
                kept = torch.tensor(keep, device=device)
                token_R, uniform_RT = token_R[kept], uniform_RT[kept]
            logits_RV = wave.step(token_R)


def _compaction(alive: list[bool]) -> list[int] | None:
    """Which row stands at each place after finished rows have left, or None while too few have.

    A finished row's place is taken by the last running one, so that few rows move.
    """
    places = -(-sum(alive) // ROW_STEP) * ROW_STEP
    if places >= len(alive):
        return None
    spare = [row for row in range(places, len(alive)) if alive[row]]
    return [row if alive[row] or not spare else spare.pop() for row in range(places)]


@contextmanager
def _generating(model: PreTrainedModel, threads: int | None) -> Iterator[None]:
    """The model in eval mode, in so many threads (None: as the process has them); both as before afterwards."""
    before, training = torch.get_num_threads(), model.training
    torch.set_num_threads(threads or before)
    model.eval()
    try:
        yield
    finally:
        torch.set_num_threads(before)
        model.train(training)
