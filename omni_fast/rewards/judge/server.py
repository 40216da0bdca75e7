"""Judges behind a server: `openai` (any OpenAI-compatible URL) and label scoring (`/v1/score`, as SGLang serves it).

`PairwiseJudge` keeps the contract over any backend: gates, both orders in one batch, cache, and failures that are
invalid.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from omni_fast.errors import UserError
from omni_fast.rewards.judge.base import Reply, gated
from omni_fast.rewards.judge.cache import VerdictCache
from omni_fast.rewards.judge.client import Failure, JsonClient, Keep, Unclear
from omni_fast.rewards.judge.pairwise import SCHEMA, Json, Question, Verdict, combine, label_verdict, parse_verdict
from omni_fast.rewards.score import Part

MAX_TOKENS = 64  # of a chat reply: room for the verdict
OPENING = "The better reply is"  # what the label follows

Messages = list[dict[str, str]]


class Backend(Protocol):
    """Something that answers questions. name: identity for the cache and the report: server kind, address, model."""

    @property
    def name(self) -> str: ...

    def ask(self, questions: Sequence[Question], keep: Keep) -> list[Verdict | Failure]:
        """One answer per question, in order; `keep` is called with each verdict as it comes. Never raises."""
        ...


@dataclass
class OpenAIBackend:
    """`POST {url}/chat/completions` at temperature 0, with a JSON schema where the server takes one.

    A server that refuses the schema (400, 422) is asked for free text from then on, read by the same strict grammar.
    """

    client: JsonClient
    model: str
    salt: str = ""
    structured: bool = True

    @property
    def name(self) -> str:
        return f"openai {self.model} at {self.client.url}"

    def ask(self, questions: Sequence[Question], keep: Keep) -> list[Verdict | Failure]:
        answers = self.client.ask("/chat/completions", map(self._payload, questions), _read_chat, keep)
        refused = [isinstance(a, Failure) and a.reason in ("http_400", "http_422") for a in answers]
        if self.structured and refused and all(refused):
            self.structured = False
            return self.ask(questions, keep)
        return answers

    def _payload(self, question: Question) -> Json:
        payload: dict[str, Json] = {
            "model": self.model,
            "messages": [{**message} for message in question.messages(self.salt)],
            "temperature": 0,
            "max_tokens": MAX_TOKENS,
        }
        if self.structured:
            schema: Json = {"name": "verdict", "strict": True, "schema": SCHEMA}
            payload["response_format"] = {"type": "json_schema", "json_schema": schema}
        return payload


@dataclass
class ScoreBackend:
    """`POST {url}/score`: the probability of one label token for A and one for B as the next token; no text to parse.

    render: chat messages -> the prompt text up to and including the start of the judge's turn (the chat template).
    labels: token ids of "A" and "B" as they follow `OPENING`.
    """

    client: JsonClient
    model: str
    render: Callable[[Messages], str]
    labels: tuple[int, int]
    salt: str = ""

    @property
    def name(self) -> str:
        return f"score {self.model} at {self.client.url}"

    def ask(self, questions: Sequence[Question], keep: Keep) -> list[Verdict | Failure]:
        return self.client.ask("/score", map(self._payload, questions), _read_scores, keep)

    def _payload(self, question: Question) -> Json:
        return {
            "model": self.model,
            "query": self.render(question.messages(self.salt)),
            "items": [OPENING],
            "label_token_ids": [*self.labels],
            "apply_softmax": True,
            "item_first": False,
        }


def check(backend: Backend) -> None:
    """Ask one question before anything depends on the server. Raises UserError saying what is wrong and where to look."""
    text = "A cat sat by the river and watched the moon."
    question = Question("Write one sentence about a cat.", text, "the the cat cat and")
    answer = backend.ask([question], lambda index, verdict: None)[0]
    if isinstance(answer, Failure):
        hint = _HINTS.get(answer.reason, "look into the server's log, or correct judge.url and judge.model")
        raise UserError(f"the judge ({backend.name}) does not give a verdict: {answer.reason}; {hint}")


_HINTS = {
    **dict.fromkeys(("down", "unreachable"), "nothing answers there: start the server, or correct judge.url"),
    "timeout": "it is too slow: raise judge.timeout_s, or take a smaller judge",
    **dict.fromkeys(("http_401", "http_403"), "set the key in the environment variable OMNI_FAST_JUDGE_KEY"),
    "http_404": "no such path or model: judge.url usually ends in /v1, and judge.model is as the server lists it",
    **dict.fromkeys(("bad_json", "wrong_schema"), "this is not an OpenAI-compatible server: correct judge.url"),
    "unclear": "the model does not answer as it is told to: take a larger judge",
}


def _read_chat(data: Json) -> Verdict:
    match data:
        case {"choices": [{"message": {"content": str(content)}}, *_]}:
            if verdict := parse_verdict(content):
                return verdict
            raise Unclear(content[:80])
    raise ValueError("no choices[0].message.content")


def _read_scores(data: Json) -> Verdict:
    match data:
        case {"scores": [[float() | int() as a, float() | int() as b]]} if 0.0 <= a <= 1.0 and 0.0 <= b <= 1.0:
            return label_verdict(a, b)
    raise ValueError("no scores[0] of two probabilities")


class PairwiseJudge:
    """The judge's contract over a backend."""

    def __init__(self, backend: Backend, cache: VerdictCache | None = None) -> None:
        self.backend, self.cache = backend, cache

    @property
    def name(self) -> str:
        return self.backend.name

    def judge(self, replies: Sequence[Reply]) -> list[Part]:
        """1 win, 0.5 tie, 0 loss against the reference; 0 with a reason behind a gate; invalid without two verdicts."""
        return gated(replies, self._judge)

    def _judge(self, replies: Sequence[Reply]) -> list[Part]:
        asked = [reply for reply in replies if reply.completion != reply.reference]
        answers = iter(self.both_orders(asked))
        return [Part(0.5, "tie") if reply.completion == reply.reference else _part(*next(answers)) for reply in replies]

    def both_orders(self, replies: Sequence[Reply]) -> list[tuple[Verdict | Failure, Verdict | Failure]]:
        """For each reply the answers with it as A and as B. Equal questions are asked once, known ones not at all."""
        sides = [side for reply in replies for side in (reply, reply.swapped())]
        questions = [Question(side.prompt, side.completion, side.reference) for side in sides]
        keys = [question.key(self.backend.name) for question in questions]
        known: dict[str, Verdict | Failure] = {**self.cache.get(keys)} if self.cache is not None else {}
        open_ = {key: question for key, question in zip(keys, questions, strict=True) if key not in known}
        names = list(open_)

        def keep(index: int, verdict: Verdict) -> None:
            if self.cache is not None:
                self.cache.put({names[index]: verdict})

        known |= dict(zip(names, self.backend.ask(list(open_.values()), keep), strict=True))
        return [(known[keys[place]], known[keys[place + 1]]) for place in range(0, len(keys), 2)]


def _part(forward: Verdict | Failure, swapped: Verdict | Failure) -> Part:
    if isinstance(forward, Failure):
        return Part(None, f"judge_{forward.reason}")
    if isinstance(swapped, Failure):
        return Part(None, f"judge_{swapped.reason}")
    value = combine(forward, swapped)
    return Part(value, "ok" if value == 1.0 else "tie" if value else "loss")
