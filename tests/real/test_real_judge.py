"""Judges for real: SmolLM2's hidden states, a server process that is killed, two processes on one cache."""

from __future__ import annotations

import http.server
import json
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from omni_fast.config import load as load_config
from omni_fast.grading import Grading
from omni_fast.policy.model import load
from omni_fast.rewards.compose import Composition, group_statistics
from omni_fast.rewards.judge.audit import audit
from omni_fast.rewards.judge.base import Reply
from omni_fast.rewards.judge.cache import VerdictCache
from omni_fast.rewards.judge.client import ClientLimits, JsonClient
from omni_fast.rewards.judge.embedded import EmbeddedJudge, fit_head
from omni_fast.rewards.judge.encode import pooled_encoder
from omni_fast.rewards.judge.sentences import prompt_text, random_prompt, reference_sentence
from omni_fast.rewards.judge.server import OpenAIBackend, PairwiseJudge
from omni_fast.rewards.score import Score


@pytest.fixture(scope="module")
def smollm2():
    return load("smollm2-135m-instruct", dtype=torch.bfloat16, device="cpu")


@pytest.fixture(scope="module")
def judge(smollm2) -> EmbeddedJudge:
    encode = pooled_encoder(*smollm2)
    return EmbeddedJudge(encode, fit_head(encode))


def test_the_embedded_judge_reaches_its_bar(judge):
    report = judge.head.report
    assert judge.usable, report.describe()
    assert report.hacks >= 200 and report.hacks_accepted <= 0.02 * report.hacks
    assert report.mean_auc >= 0.85 and report.auc[report.worst_family] >= 0.70


def test_the_embedded_judge_passes_the_audit(judge):
    result = audit(judge)
    assert result.passed, result.table()
    assert result.shares["position_bias"].value == 0.0 and (result.shares["agreement"].value or 0.0) >= 0.8, (
        result.table()
    )
    assert (result.families["by_hand"].value or 0.0) >= 0.6, "pairs that no grammar made"


def test_real_samples_give_mixed_groups(judge, smollm2):
    """What a 135M policy writes at temperature 1 must spread over the judge's range, or there is nothing to learn."""
    model, tokenizer = smollm2
    rng = random.Random(3)
    prompts = [random_prompt(rng) for _ in range(8)]
    chats = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt_text(*prompt)}], tokenize=False, add_generation_prompt=True
        )
        for prompt in prompts
    ]
    tokenizer.padding_side = "left"
    torch.manual_seed(0)
    inputs = tokenizer(chats, return_tensors="pt", padding=True, add_special_tokens=False)
    with torch.inference_mode():
        output = model.generate(**inputs, max_new_tokens=24, do_sample=True, top_k=0, num_return_sequences=6)
    texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    replies = [
        Reply(prompt_text(topic, words), texts[6 * row + k], reference_sentence(topic, words, rng), words)
        for row, (topic, words) in enumerate(prompts)
        for k in range(6)
    ]
    parts = judge.judge(replies)
    groups = [[Score({"preference": part}) for part in parts[6 * row : 6 * row + 6]] for row in range(8)]
    assert group_statistics(groups, Composition("additive", {"preference": 1.0})).mixed_share >= 0.5
    references = judge.judge([Reply(r.prompt, r.reference, r.reference, r.required) for r in replies])
    assert sum(p.value or 0.0 for p in parts) < sum(p.value or 0.0 for p in references) == len(replies)


SERVER = """
    import http.server, json, re, socketserver, sys, time
    class H(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            text = body["messages"][-1]["content"]
            mark = re.search(r"between the marks (\\\\w+)", text)[1]
            a, b = re.findall(rf"<{mark}>\\n(.*?)\\n</{mark}>", text, re.DOTALL)[1:]
            time.sleep(0.01)
            verdict = "A" if "wonderful" in a else "B" if "wonderful" in b else "tie"
            data = json.dumps({"choices": [{"message": {"content": json.dumps({"verdict": verdict})}}]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
        def log_message(self, *a): pass
    class S(socketserver.ThreadingMixIn, http.server.HTTPServer):
        daemon_threads, allow_reuse_address, request_queue_size = True, True, 128
    S(("127.0.0.1", int(sys.argv[1])), H).serve_forever()
"""


def start_server(port: int) -> subprocess.Popen[bytes]:
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(SERVER).replace("\\\\w", "\\w"), str(port)])
    for _ in range(500):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return process
        time.sleep(0.02)
    process.kill()
    raise AssertionError("the judge server did not start")


def test_a_judge_process_killed_again_and_again_loses_and_zeroes_nothing(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    numbers = [f"{a}{b}" for a in "abcdefghijkl" for b in "mnopqrstuvwxyz"][:150]
    prompt = "Write one sentence about a cat."
    replies = [
        Reply(prompt, f"The {'wonderful' if i % 2 else 'ordinary'} cat saw {name} under the old tree.", f"A cat met {name} near the {'house' if i % 2 else 'wonderful house'}.")
        for i, name in enumerate(numbers)
    ]  # fmt: skip
    cache = VerdictCache(tmp_path / "verdicts.sqlite")
    limits = ClientLimits(concurrency=8, timeout_s=2.0, backoff_s=0.02, backoff_max_s=0.3, pause_s=60.0)
    judge = PairwiseJudge(OpenAIBackend(JsonClient(f"http://127.0.0.1:{port}/v1", limits=limits), "m"), cache)
    parts: list = []
    worker = threading.Thread(target=lambda: parts.extend(judge.judge(replies)))
    process = start_server(port)
    worker.start()
    try:
        for _ in range(3):
            time.sleep(0.15)
            process.send_signal(signal.SIGKILL)
            process.wait()
            time.sleep(0.3)
            process = start_server(port)
        worker.join(timeout=60)
        assert not worker.is_alive()
    finally:
        process.kill()
        process.wait()
    assert [part.value for part in parts] == [float(i % 2) for i in range(len(replies))]


def test_an_sglang_judge_of_a_config_is_asked_for_label_probabilities(tmp_path):
    """The wire contract of /v1/score, with a real tokenizer: the chat ends where the label comes next."""
    asked: list[dict] = []

    class Score(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append({**body, "path": self.path, "key": self.headers["Authorization"]})
            first, second = (part.count("wonderful") for part in body["query"].split("Reply B (")[:2])
            data = json.dumps({"scores": [[0.9, 0.1] if first > second else [0.1, 0.9]]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args: object) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Score)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    wanted = ("judge.backend=sglang", f"judge.url={url}", "judge.model=smollm2-135m-instruct")
    with ExitStack() as stack:
        stack.callback(server.shutdown)
        judge = Grading(load_config("quickstart", wanted), stack, tmp_path).reward_judge()
        good, plain = (
            "The wonderful cat saw the moon from an old tree.",
            "The ordinary cat saw the moon from an old tree.",
        )
        parts = judge.judge(
            [Reply("Write one sentence about a cat.", *pair) for pair in ((good, plain), (plain, good))]
        )
    assert [part.value for part in parts] == [1.0, 0.0]
    request = asked[-1]
    assert request["path"] == "/v1/score" and request["item_first"] is False and request["apply_softmax"] is True
    assert request["query"].endswith("<|im_start|>assistant\n") and request["items"] == ["The better reply is"]
    assert len(set(request["label_token_ids"])) == 2


def _write(path: str, start: int, count: int) -> None:
    cache = VerdictCache(Path(path))
    for i in range(start, start + count):
        cache.put({f"key{i}": "A" if i % 2 else "B"})
        assert cache.get([f"key{i}"]), i
    cache.close()


def test_two_processes_share_a_cache_and_a_killed_one_harms_nothing(tmp_path):
    path = str(tmp_path / "v.sqlite")
    spawn = multiprocessing.get_context("spawn")
    writers = [spawn.Process(target=_write, args=(path, start, 400)) for start in (0, 200)]
    victim = spawn.Process(target=_write, args=(path, 10_000, 1_000_000))
    for process in (*writers, victim):
        process.start()
    for process in writers:
        process.join(timeout=120)
        assert process.exitcode == 0
    while not VerdictCache(Path(path)).get(["key10050"]):
        time.sleep(0.05)
    assert victim.pid is not None
    os.kill(victim.pid, signal.SIGKILL)
    victim.join()
    said: list[str] = []
    cache = VerdictCache(Path(path), said.append)
    found = cache.get(f"key{i}" for i in range(600))
    assert len(found) == 600 and all(verdict == ("A" if int(key[3:]) % 2 else "B") for key, verdict in found.items())
    assert cache.get(["key10000"]) and not said
