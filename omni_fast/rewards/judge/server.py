"""Judges behind a server: `openai` (any OpenAI-compatible URL) and label scoring (`/v1/score`, as SGLang serves it).

`PairwiseJudge` keeps the contract over any backend: gates, both orders in one batch, cache, and failures that are
invalid.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from omni_fast.errors import UserError
from omni_fast.rewards.judge.base import Reply
from omni_fast.rewards.judge.cache import VerdictCache
from omni_fast.rewards.judge.client import ClientLimits, Failure, Json, JsonClient, Request, Unclear
from omni_fast.rewards.judge.pairwise import (
    SCHEMA,
    Question,
    Verdict,
    combine,
    label_verdict,
    parse_verdict,
    strip_reasoning,
)
from omni_fast.rewards.score import Part
from omni_fast.rewards.text_checks import gate

Keep = Callable[[int, Verdict], None]
Messages = list[dict[str, str]]


class Backend(Protocol):
    """Something that answers questions. name: identity for the cache and the report: server kind, address, model."""

    name: str

    def ask(self, questions: Sequence[Question], keep: Keep) -> list[Verdict | Failure]:
        """One answer per question, in order; `keep` is called with each verdict as it comes. Never raises."""
        ...


class OpenAIBackend:
    """`POST {url}/chat/completions` at temperature 0, with a JSON schema where the server takes one.

    A server that refuses the schema (400, 422) is asked for free text from then on, read by the same strict grammar.
    max_tokens: room for the verdict; a judge that reasons needs more.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        api_key: str = "",
        limits: ClientLimits | None = None,
        salt: str = "",
        max_tokens: int = 64,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.name = f"openai {model} at {url}"
        self.model, self.salt, self.max_tokens = model, salt, max_tokens
        self.structured = True
        self.client: JsonClient[Verdict] = JsonClient(url, _authorised(api_key), limits, say)

    def ask(self, questions: Sequence[Question], keep: Keep) -> list[Verdict | Failure]:
        answers = self.client.ask([self._request(question) for question in questions], keep)
        refused = [i for i, a in enumerate(answers) if isinstance(a, Failure) and a.reason in ("http_400", "http_422")]
        if self.structured and refused and len(refused) == len(answers):
            self.structured = False
            return self.ask(questions, keep)
        return answers

    def _request(self, question: Question) -> Request[Verdict]:
        messages: list[Json] = [{**message} for message in question.messages(self.salt)]
        payload: dict[str, Json] = {
            "model": self.model,
            "messages": messages,
            "temperature": 0,
            "max_tokens": self.max_tokens,
            "stream": False,
        }
        if self.structured:
            schema: Json = {"name": "verdict", "strict": True, "schema": _as_json(SCHEMA)}
            payload["response_format"] = {"type": "json_schema", "json_schema": schema}
        return Request("/chat/completions", payload, _read_chat)


class ScoreBackend:
    """`POST {url}/score`: the probability of one label token for A and one for B as the next token; no text to parse.

    render: chat messages -> the prompt text up to and including the start of the judge's turn (the chat template).
    labels: token ids of "A" and "B" as they follow `opening`.
    """

    def __init__(
        self,
        url: str,
        model: str,
        render: Callable[[Messages], str],
        labels: tuple[int, int],
        *,
        opening: str = "The better reply is",
        api_key: str = "",
        limits: ClientLimits | None = None,
        salt: str = "",
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.name = f"score {model} at {url}"
        self.model, self.render, self.labels, self.opening, self.salt = model, render, labels, opening, salt
        self.client: JsonClient[Verdict] = JsonClient(url, _authorised(api_key), limits, say)

    def ask(self, questions: Sequence[Question], keep: Keep) -> list[Verdict | Failure]:
        return self.client.ask([self._request(question) for question in questions], keep)

    def _request(self, question: Question) -> Request[Verdict]:
        payload: Json = {
            "model": self.model,
            "query": self.render(question.messages(self.salt)),
            "items": [self.opening],
            "label_token_ids": list(self.labels),
            "apply_softmax": True,
            "item_first": False,
        }
        return Request("/score", payload, _read_scores)


def check(backend: Backend) -> None:
    """Ask one question before anything depends on the server. Raises UserError saying what is wrong and where to look."""
    text = "A cat sat by the river and watched the moon."
    question = Question("Write one sentence about a cat.", text, "the the cat cat and")
    answer = backend.ask([question], lambda index, verdict: None)[0]
    if isinstance(answer, Failure):
        hint = _HINTS.get(answer.reason, "look into the server's log, or correct judge.url and judge.model")
        raise UserError(f"the judge ({backend.name}) does not give a verdict: {answer.reason}; {hint}")


_HINTS = {
    "down": "nothing answers there: start the server, or correct judge.url",
    "unreachable": "nothing answers there: start the server, or correct judge.url",
    "timeout": "it is too slow: raise judge.timeout_s, or take a smaller judge",
    "http_401": "set the key in the environment variable OMNI_FAST_JUDGE_KEY",
    "http_403": "set the key in the environment variable OMNI_FAST_JUDGE_KEY",
    "http_404": "there is no such path or model: judge.url usually ends in /v1, and judge.model is as the server lists it",
    "bad_json": "this is not an OpenAI-compatible server: correct judge.url",
    "wrong_schema": "this is not an OpenAI-compatible server: correct judge.url",
    "unclear": "the model does not answer as it is told to: take a larger judge",
}


def _authorised(api_key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {api_key}"} if api_key else {}


def _as_json(value: object) -> Json:
    if isinstance(value, dict):
        return {str(key): _as_json(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_as_json(item) for item in value]
    assert value is None or isinstance(value, (bool, int, float, str))
    return value


def _read_chat(data: Json) -> Verdict:
    choices = data.get("choices") if isinstance(data, dict) else None
    first = choices[0] if isinstance(choices, list) and choices else None
    message = first.get("message") if isinstance(first, dict) else None
    content = message.get("content") if isinstance(message, dict) else None
    if not isinstance(content, str):
        raise ValueError("no choices[0].message.content")
    verdict = parse_verdict(content)
    if verdict is None:
        raise Unclear(content[:80])
    return verdict


def _read_scores(data: Json) -> Verdict:
    scores = data.get("scores") if isinstance(data, dict) else None
    row = scores[0] if isinstance(scores, list) and len(scores) == 1 else None
    if not isinstance(row, list) or len(row) != 2:
        raise ValueError("no scores[0] of two labels")
    values = [float(x) for x in row if isinstance(x, (int, float)) and not isinstance(x, bool) and 0.0 <= x <= 1.0]
    if len(values) != 2:
        raise ValueError("scores are not probabilities")
    return label_verdict(values)


class PairwiseJudge:
    """The judge's contract over a backend. Counts `asked`, `cached` and `disagreed` (the two orders contradict) for
    reports."""

    def __init__(self, backend: Backend, cache: VerdictCache | None = None) -> None:
        self.backend, self.cache = backend, cache
        self.asked = self.cached = self.disagreed = 0

    @property
    def name(self) -> str:
        return self.backend.name

    def judge(self, replies: Sequence[Reply]) -> list[Part]:
        """1 win, 0.5 tie, 0 loss against the reference; 0 with a reason behind a gate; invalid without two verdicts."""
        parts: list[Part | None] = []
        asked: list[tuple[int, Question, Question]] = []
        for place, reply in enumerate(replies):
            text, reference = strip_reasoning(reply.completion), strip_reasoning(reply.reference)
            refused = gate(reply.prompt, text, reply.required)
            if refused:
                parts.append(Part(0.0, refused))
            elif text == reference:
                parts.append(Part(0.5, "tie"))
            else:
                parts.append(None)
                forward = Question(reply.prompt, text, reference)
                asked.append((place, forward, Question(reply.prompt, reference, text)))
        answers = self.verdicts([question for _, *both in asked for question in both])
        for row, (place, _, _) in enumerate(asked):
            parts[place] = self._part(answers[2 * row], answers[2 * row + 1])
        return [part for part in parts if part is not None]

    def verdicts(self, questions: Sequence[Question]) -> list[Verdict | Failure]:
        """One answer per question; equal questions are asked once, known ones not at all."""
        keys = [question.key(self.backend.name) for question in questions]
        known: dict[str, Verdict | Failure] = {}
        if self.cache is not None:
            known |= self.cache.get(keys)
        self.cached += sum(key in known for key in keys)
        open_ = {key: question for key, question in zip(keys, questions, strict=True) if key not in known}
        names = list(open_)
        self.asked += len(names)

        def keep(index: int, verdict: Verdict) -> None:
            if self.cache is not None:
                self.cache.put({names[index]: verdict})

        known |= dict(zip(names, self.backend.ask(list(open_.values()), keep), strict=True))
        return [known[key] for key in keys]

    def _part(self, forward: Verdict | Failure, swapped: Verdict | Failure) -> Part:
        for answer in (forward, swapped):
            if isinstance(answer, Failure):
                return Part(None, f"judge_{answer.reason}")
        assert not isinstance(forward, Failure) and not isinstance(swapped, Failure)
        self.disagreed += forward == swapped != "tie"
        value = combine(forward, swapped)
        return Part(value, "ok" if value == 1.0 else "tie" if value else "loss")
