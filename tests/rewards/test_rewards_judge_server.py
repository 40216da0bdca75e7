"""The server judges against a real HTTP server that misbehaves: nothing lost, nothing scored 0 for it, nothing raised."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from judge_server import Behaviour, honest, serving

from omni_fast.errors import UserError
from omni_fast.rewards.judge.base import Reply
from omni_fast.rewards.judge.cache import VerdictCache
from omni_fast.rewards.judge.client import ClientLimits, JsonClient
from omni_fast.rewards.judge.pairwise import Question, combine, label_verdict, parse_verdict
from omni_fast.rewards.judge.server import OpenAIBackend, PairwiseJudge, ScoreBackend, check
from omni_fast.rewards.text_checks import strip_reasoning


def stall(seconds: float) -> Behaviour:
    return lambda handler, body, number: time.sleep(seconds)


FAST = ClientLimits(timeout_s=1.0, backoff_s=0.01, backoff_max_s=0.05, pause_s=10.0)
PROMPT = "Write one sentence about a cat that uses the words moon and river."
GOOD = "My quick brown cat jumped over the lazy river while the vexed moon hid its gaze."  # many letters: wins
POOR = "The moon sees the tree near the river then the moon nests there."  # few letters: loses
NEAR = "stone thorn shore raven mint heath siren tavern vine north harvest storm moth nest mast men ant heron rain otter".split()
MIDDLE = "The quiet cat dreamed of the moon and the river."


def replies(count: int) -> list[Reply]:
    """Alternating wins and losses, all different, so that order and completeness show."""
    return [Reply(PROMPT, f"{(GOOD, POOR)[i % 2]} It saw the {NEAR[i // 2]}.", MIDDLE) for i in range(count)]


def expected(count: int) -> list[float]:
    return [1.0 - i % 2 for i in range(count)]


def judge_of(url: str, limits: ClientLimits = FAST, cache: VerdictCache | None = None, said: list[str] | None = None):
    client = JsonClient(url, limits=limits, say=(said if said is not None else []).append)
    return PairwiseJudge(OpenAIBackend(client, "m", "s"), cache)


def test_both_orders_and_values():
    with serving(lambda h, body, n: h.honest(body)) as server:
        judge = judge_of(server.url)
        parts = judge.judge([*replies(6), Reply(PROMPT, MIDDLE, MIDDLE), Reply(PROMPT, "Solution", MIDDLE)])
        assert [part.value for part in parts] == [*expected(6), 0.5, 0.0]
        assert server.count == 12, "two orders each; the equal text and the gated one cost nothing"
        assert all(request["temperature"] == 0 and "response_format" in request for request in server.requests)


def test_a_position_biased_judge_only_ties():
    with serving(lambda h, body, n: h.verdict('{"verdict": "A"}')) as server:
        assert {part.value for part in judge_of(server.url).judge(replies(4))} == {0.5}


BEHAVIOURS = {
    "http_500": lambda h, body, n: h.reply(500, b"oops"),
    "http_503_html": lambda h, body, n: h.reply(503, b"<html>down</html>"),
    "http_429": lambda h, body, n: h.reply(429, b"slow down", {"Retry-After": "0"}),
    "bad_json": lambda h, body, n: h.reply(200, b'{"choices": ['),
    "not_utf8": lambda h, body, n: h.reply(200, b"\xff\xfe\x00"),
    "deep_json": lambda h, body, n: h.reply(200, b"[" * 100_000),
    "wrong_schema": lambda h, body, n: h.reply(200, b'{"choices": [{"text": "A"}]}'),
    "null_content": lambda h, body, n: h.reply(200, b'{"choices": [{"message": {"content": null}}]}'),
    "empty": lambda h, body, n: h.reply(200, b""),
    "cut_off": lambda h, body, n: (h.reply(200, b'{"choices"', length=500), h.connection.close()),
    "huge": lambda h, body, n: h.reply(200, b" " * (3 << 20)),
    "unclear": lambda h, body, n: h.verdict("Both are lovely, but A is a bit better than B."),
    "two_verdicts": lambda h, body, n: h.verdict('{"verdict": "A"} {"verdict": "B"}'),
    "extra_key": lambda h, body, n: h.verdict('{"verdict": "A", "score": 10}'),
    "stalls": stall(1.2),
}


@pytest.mark.parametrize("name", sorted(BEHAVIOURS))
def test_a_server_that_misbehaves_now_and_then_costs_nothing(name):
    """Every third request goes wrong, whatever the way: all samples get their right value all the same."""

    def behave(handler, body, number):
        (BEHAVIOURS[name] if number % 3 == 0 else type(handler).honest)(
            *((handler, body, number)[: 3 if number % 3 == 0 else 2])
        )

    with serving(behave) as server:
        limits = ClientLimits(timeout_s=0.5, backoff_s=0.01, backoff_max_s=0.05, attempts=12, pause_s=10.0)
        parts = judge_of(server.url, limits).judge(replies(8))
    assert [part.value for part in parts] == expected(8)


@pytest.mark.parametrize("name", sorted(BEHAVIOURS))
def test_a_server_that_only_misbehaves_makes_invalid_never_zero(name):
    limits = ClientLimits(timeout_s=0.2, backoff_s=0.01, backoff_max_s=0.02, attempts=3, pause_s=0.3)
    with serving(BEHAVIOURS[name]) as server:
        parts = judge_of(server.url, limits).judge(replies(3))
    assert [part.value for part in parts] == [None] * 3
    assert all(part.reason.startswith("judge_") for part in parts)


def test_refused_connection_is_invalid_and_said_once():
    with serving(lambda h, body, n: None) as server:
        url = server.url
    said: list[str] = []
    limits = ClientLimits(timeout_s=0.5, backoff_s=0.01, backoff_max_s=0.05, pause_s=0.3)
    parts = judge_of(url, limits, said=said).judge(replies(20))
    assert [part.value for part in parts] == [None] * 20 and {part.reason for part in parts} <= {
        "judge_down", "judge_unreachable"
    }  # fmt: skip
    assert len(said) == 1 and "Nothing is scored 0" in said[0]


def test_dies_in_the_middle_of_a_batch_and_comes_back():
    """The server is killed after some answers and restarted: the call pauses, resumes, and loses no sample."""
    said: list[str] = []
    with serving(lambda h, body, n: (time.sleep(0.02), h.honest(body))) as first:
        url, port = first.url, first.server_address[1]
        judge = judge_of(url, ClientLimits(concurrency=4, timeout_s=1.0, backoff_s=0.02, pause_s=30.0), said=said)
        result: list = []
        worker = threading.Thread(target=lambda: result.extend(judge.judge(replies(40))))
        worker.start()
        while first.count < 20:
            time.sleep(0.005)
    time.sleep(0.5)
    with serving(lambda h, body, n: h.honest(body), port):
        worker.join(timeout=30)
    assert [part.value for part in result] == expected(40)
    assert any("waiting for it" in line for line in said) and any("answers again" in line for line in said)


NONSENSE = {"words": "soon", "far": "Mon, 23 Nov 9999999999999 14:30:00 GMT", "past": "Mon, 23 Nov 1998 14:30:00 GMT"}


@pytest.mark.parametrize("form", ["number", "date", *NONSENSE])
def test_retry_after_is_honoured(form):
    first: list[float] = []
    again: list[float] = []

    def behave(handler, body, number):
        (again if first else first).append(time.monotonic())
        if len(first) + len(again) > 1:
            handler.honest(body)
            return
        date = format_datetime(datetime.now(UTC) + timedelta(seconds=2), usegmt=True)
        handler.reply(429, b"", {"Retry-After": ({"number": "1", "date": date} | NONSENSE)[form]})

    with serving(behave) as server:
        limits = ClientLimits(concurrency=1, backoff_s=0.01)
        parts = judge_of(server.url, limits).judge(replies(2))
    assert [part.value for part in parts] == expected(2)
    assert (min(again) - first[0] >= 0.9) == (form not in NONSENSE)


def test_a_success_in_flight_does_not_forget_a_retry_after():
    times: list[float] = []

    def behave(handler, body, number):
        times.append(time.monotonic())
        if number < 3:
            handler.reply(429, b"", {"Retry-After": "1"})
        else:
            time.sleep(0.3 * (number == 3))
            handler.honest(body)

    with serving(behave) as server:
        limits = ClientLimits(concurrency=3, backoff_s=0.01, breaker_failures=2, pause_s=10.0)
        parts = judge_of(server.url, limits).judge(replies(4))
    assert [part.value for part in parts] == expected(4)
    assert times[3] - times[0] >= 0.9


def test_late_failures_do_not_put_the_probe_off():
    """The answers to a batch fail one by one; the first probe goes out in the midst of them."""
    asked: list[float] = []
    failed: list[float] = []

    def behave(handler, body, number):
        asked.append(time.monotonic())
        if number > 12:
            handler.honest(body)
            return
        time.sleep(0.1 * number)
        failed.append(time.monotonic())
        handler.reply(500, b"")

    with serving(behave) as server:
        limits = ClientLimits(attempts=12, backoff_s=0.01, backoff_max_s=0.2, breaker_failures=1, pause_s=10.0)
        parts = judge_of(server.url, limits).judge(replies(6))
    assert [part.value for part in parts] == expected(6)
    assert asked[12] < failed[-1]


def test_a_server_without_json_schema_is_asked_for_free_text():
    def behave(handler, body, number):
        if "response_format" in body:
            handler.reply(400, b"json_schema is not supported")
        else:
            handler.verdict(f"<think>long reasoning, maybe A</think>\n{honest(body)}")

    with serving(behave) as server:
        judge = judge_of(server.url)
        assert [part.value for part in judge.judge(replies(4))] == expected(4)
        before = server.count
        judge.judge([Reply(PROMPT, GOOD + " New.", MIDDLE)])
        assert server.count == before + 2, "the schema is not tried again"


def test_wrong_key_is_invalid_without_endless_retries():
    with serving(lambda h, body, n: h.reply(401, b"no")) as server:
        limits = ClientLimits(backoff_s=0.01, pause_s=0.2)
        parts = judge_of(server.url, limits).judge(replies(2))
    assert [part.reason for part in parts] == ["judge_http_401"] * 2


def test_score_backend_reads_label_probabilities():
    def behave(handler, body, number):
        payload = {"messages": [{"content": body["query"]}]}
        win = {"A": [0.9, 0.1], "B": [0.2, 0.8], "tie": [0.5, 0.5]}[honest(payload)]
        assert body["label_token_ids"] == [7, 8] and body["items"] == ["The better reply is"]
        handler.reply(200, json.dumps({"scores": [win] if number % 4 else [[0.5, "x"]]}).encode())

    with serving(behave) as server:
        client = JsonClient(server.url, limits=FAST)
        backend = ScoreBackend(client, "m", lambda messages: messages[-1]["content"], (7, 8), "s")
        assert [part.value for part in PairwiseJudge(backend).judge(replies(6))] == expected(6)


def test_cache_saves_requests_and_is_shared(tmp_path):
    with serving(lambda h, body, n: h.honest(body)) as server:
        first = judge_of(server.url, cache=VerdictCache(tmp_path / "v.sqlite"))
        assert [part.value for part in first.judge(replies(4) + replies(4))] == expected(8)
        assert server.count == 8, "equal questions are asked once"
        second = judge_of(server.url, cache=VerdictCache(tmp_path / "v.sqlite"))
        assert [part.value for part in second.judge(replies(6))] == expected(6)
        assert server.count == 12


def test_verdicts_given_before_an_interrupt_are_kept(tmp_path):
    go_on = threading.Event()

    def behave(handler, body, number):
        if number > 10:
            go_on.wait(30)
        handler.honest(body)

    with serving(behave) as server, ThreadPoolExecutor(1) as thread:
        judge = judge_of(server.url, ClientLimits(concurrency=4), VerdictCache(tmp_path / "v.sqlite"))
        job = thread.submit(judge.judge, replies(8))
        while server.count < 14:
            time.sleep(0.01)
        judge.backend.client.close()
        with pytest.raises(asyncio.CancelledError):
            job.result(timeout=10)
        go_on.set()
        again = judge_of(server.url, cache=VerdictCache(tmp_path / "v.sqlite"))
        assert [part.value for part in again.judge(replies(8))] == expected(8)
        assert server.count == 14 + 16 - 10


def test_failures_are_never_cached(tmp_path):
    cache = VerdictCache(tmp_path / "v.sqlite")
    limits = ClientLimits(timeout_s=0.3, backoff_s=0.01, pause_s=0.2)
    with serving(BEHAVIOURS["http_500"]) as server:
        url, port = server.url, server.server_address[1]
        assert not any(part.valid for part in judge_of(url, limits, cache).judge(replies(2)))
    with serving(lambda h, body, n: h.honest(body), port):
        assert [part.value for part in judge_of(url, cache=cache).judge(replies(2))] == expected(2)


def test_damaged_and_unwritable_caches_do_not_stop_the_run(tmp_path):
    said: list[str] = []
    path, aside = tmp_path / "v.sqlite", tmp_path / "v.sqlite.damaged"
    whole = VerdictCache(path)
    whole.put({f"key {k}": "A" for k in range(1000)})
    whole.close()
    page = bytearray(path.read_bytes())
    page[8192:12288] = bytes(4096)
    for damage in (b"this is not a database, " * 500, bytes(page)):
        path.write_bytes(damage)
        cache = VerdictCache(path, said.append)
        assert "damaged" in said.pop() and not said and aside.read_bytes() == damage
        cache.put({"k": "A"})
        cache.close()
        assert cache.get(["k"]) == {} and VerdictCache(path, said.append).get(["k"]) == {"k": "A"} and not said
    lost = VerdictCache(aside / "x" / "v.sqlite", said.append)
    lost.put({"k": "A"})
    assert lost.get(["k"]) == {} and len(said) == 1 and "cannot be used" in said[0]


def test_marks_cannot_be_forged_and_depend_on_the_salt():
    question = Question(PROMPT, GOOD, MIDDLE)
    body = question.messages("one")[1]["content"]
    assert body == question.messages("one")[1]["content"] != question.messages("two")[1]["content"]
    forged = Question(PROMPT, body, MIDDLE).messages("one")[1]["content"]
    mark = forged.split("between the marks ")[1].split(")")[0]
    assert f"</{mark}>" not in body


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ('{"verdict": "A"}', "A"),
        (' {"verdict":"tie"}\n', "tie"),
        ('```json\n{"verdict": "B"}\n```', "B"),
        ("<think>A or B? A!</think> B", "B"),
        ("Verdict: A", None),
        ("verdict: A", "A"),
        ("[[A]]", "A"),
        ("A.", "A"),
        ("(A)", "A"),
        ('"A"', "A"),
        ("(A]", None),
        ("[[A)]", None),
        ("(A", None),
        ("A]", None),
        ("[(tie)]", "tie"),
        ("A <think>or B", None),
        ("Hm, A?</think>B<think>", None),
        ("<think>A</think>B", "B"),
        ("A is better", None),
        ('{"verdict": "a"}', None),
        ('{"verdict": ["A"]}', None),
        ('{"verdict": "A", "why": "x"}', None),
        ('{"verdict": "A", "verdict": "B"}', None),
        ('{"verdict": "A", "\\u0076erdict": "B"}', None),
        ('{"verdict": "A"', None),
        ("{}", None),
        ('[{"verdict": "A"}]', None),
        ("AB", None),
        ("<think>A", None),
        ("", None),
    ],
)
def test_verdict_grammar(text, verdict):
    assert parse_verdict(text) == verdict


def test_combination_and_labels():
    assert [combine(a, b) for a, b in (("A", "B"), ("B", "A"), ("A", "A"), ("A", "tie"), ("tie", "tie"))] == [
        1.0, 0.0, 0.5, 0.5, 0.5
    ]  # fmt: skip
    assert [label_verdict(*p) for p in ([0.7, 0.3], [0.3, 0.7], [0.52, 0.48], [0.0, 0.0])] == ["A", "B", "tie", "tie"]


def test_reasoning_is_stripped_and_never_hangs():
    assert strip_reasoning("<think>a</think> b <thinking>c</thinking> d") == "d"
    assert strip_reasoning("answer <think>never closed") == "answer"
    assert strip_reasoning("<think>" * 50_000) == ""
    assert strip_reasoning("plain") == "plain"


@pytest.mark.parametrize("url", ["", "localhost:8000", "ftp://x/v1", "http://", "http://x:port"])
def test_bad_urls_are_a_users_mistake(url):
    with pytest.raises(UserError, match="http"):
        JsonClient(url)


@pytest.mark.parametrize(
    ("behave", "hint"),
    [
        ("http_500", "judge.url"),
        ("bad_json", "not an OpenAI-compatible server"),
        ("wrong_schema", "not an OpenAI-compatible server"),
        ("unclear", "larger judge"),
        ("stalls", "judge.timeout_s"),
    ],
)
def test_a_server_that_cannot_judge_is_told_before_training(behave, hint):
    limits = ClientLimits(timeout_s=0.2, backoff_s=0.01, attempts=2, pause_s=0.3)
    with serving(BEHAVIOURS[behave]) as server, pytest.raises(UserError, match=hint):
        check(OpenAIBackend(JsonClient(server.url, limits=limits), "m"))


@pytest.mark.parametrize(("status", "hint"), [(401, "OMNI_FAST_JUDGE_KEY"), (404, "ends in /v1")])
def test_a_refusal_names_the_setting_to_correct(status, hint):
    limits = ClientLimits(timeout_s=0.5, backoff_s=0.01, pause_s=0.3)
    with serving(lambda h, body, n: h.reply(status, b"no")) as server, pytest.raises(UserError, match=hint):
        check(OpenAIBackend(JsonClient(server.url, limits=limits), "m"))


def test_nothing_at_the_address_is_told_and_a_good_server_passes():
    limits = ClientLimits(timeout_s=0.5, backoff_s=0.01, pause_s=0.3)
    with serving(lambda h, body, n: h.honest(body)) as server:
        url = server.url
        check(OpenAIBackend(JsonClient(url, limits=limits), "m"))
    with pytest.raises(UserError, match="nothing answers there"):
        check(OpenAIBackend(JsonClient(url, limits=limits), "m"))


def test_calls_under_way_end_when_the_client_is_closed():
    """Two judged tasks are scored by a thread each."""
    with serving(stall(30.0)) as server:
        backend = OpenAIBackend(JsonClient(server.url, limits=ClientLimits(timeout_s=30.0)), "m")
        with ThreadPoolExecutor(2) as threads:
            jobs = [threads.submit(PairwiseJudge(backend).judge, replies(2)) for _ in range(2)]
            while server.count < 8:
                time.sleep(0.01)
            backend.client.close()
            start = time.monotonic()
            for job in jobs:
                with pytest.raises(asyncio.CancelledError):
                    job.result(timeout=10)
            assert time.monotonic() - start < 10
