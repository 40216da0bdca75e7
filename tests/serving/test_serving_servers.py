"""Starting, watching and stopping servers, with a small HTTP process in SGLang's place: same command line, same answers."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from omni_fast import serving
from omni_fast.cli import app
from omni_fast.config import EngineConfig
from omni_fast.errors import RunError, UserError
from omni_fast.serving import Launch, install, process, servers
from omni_fast.serving.launch import KEY_VARIABLE, SHIM, command, environment, launches, write_key

# Behaves as the model folder's name says; starts a child as SGLang does. For the shell it begins with ":" and an exec, as a first
# line with blanks in the path of Python would be no program; for Python, with a string.
PROGRAM = """#!/bin/sh
''':'
exec '{python}' -S "$0" "$@"
'''
import http.server, json, os, signal, subprocess, sys, time
flags = dict(zip(sys.argv[3::2], sys.argv[4::2]))
kind = os.path.basename(flags["--model-path"])
if kind == "once":
    seen = flags["--model-path"] + ".seen"
    kind = "slow" if os.path.exists(seen) else "good"
    open(seen, "w").close()
print("server_args=", sys.argv, open(flags["--config"]).read() if "--config" in flags else "", flush=True)
if kind == "dies":
    sys.exit("Ignore import error of a model: No module named 'vllm'\\nTraceback\\nRuntimeError: something broke")
if kind == "oom":
    sys.exit("Traceback\\nRuntimeError: Not enough memory. Please try to increase --mem-fraction-static.")
if kind == "taken":
    sys.exit("ERROR: [Errno 98] error while attempting to bind on address: address already in use")
if kind == "slower":
    time.sleep(1)
    sys.exit("ERROR: [Errno 98] error while attempting to bind on address: address already in use")
if kind == "lacks":
    sys.exit("Traceback\\nModuleNotFoundError: No module named 'sgl_kernel'")
if kind == "nowhere":
    sys.exit("Traceback\\nOSError: Repo id must use alphanumeric chars, '-', '_' or '.': '/nowhere'.")
if kind == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if kind == "flag":
    sys.exit("launch_server.py: error: unrecognized arguments: --nonsense")
if kind == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"])
ready = time.monotonic() + (600 if kind == "slow" else 0.2)
paused = False
class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        global paused
        paused = self.path == "/pause_generation"
        self.do_GET()
    def do_GET(self):
        body = {{"/server_info": {{"version": "0.5.17"}}, "/model_info": {{"weight_version": "3"}}}}.get(self.path, {{}})
        data = json.dumps(body).encode()
        self.send_response(200 if time.monotonic() > ready and not paused else 503)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
http.server.HTTPServer((flags["--host"], int(flags["--port"])), Handler).serve_forever()
"""


class Place(NamedTuple):
    """A folder for servers whose Python is the program above."""

    folder: Path
    said: list[str]

    def start(self, *kinds: str, timeout_s: float = 20.0, port: int = 0, model: str = "") -> list[serving.Server]:
        wanted = [Launch(f"policy-{i}", f"{model}/{kind}", port=port) for i, kind in enumerate(kinds)]
        return serving.start(wanted, self.folder, timeout_s=timeout_s, say=self.said.append)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    program = tmp_path / "python"
    program.write_text(PROGRAM.format(python=sys.executable))
    program.chmod(0o700)
    monkeypatch.setenv(install.PYTHON_VARIABLE, str(program))
    monkeypatch.setattr(servers, "STOP_GRACE_S", 1.0)
    folder = tmp_path / "servers"
    yield Place(folder, [])
    serving.down(folder, say=lambda line: None)


def wait_until_dead(server: serving.Server) -> None:
    until = time.monotonic() + 10
    while server.alive and time.monotonic() < until:
        time.sleep(0.02)
    assert not server.alive


def test_servers_start_are_found_from_the_state_and_stop_with_their_children(place: Place) -> None:
    started = place.start("good", "good")
    assert len({server.url for server in started}) == 2
    found = serving.status(place.folder)
    assert [one.server for one in found] == started
    assert [(one.state, one.weight_version, one.server.version) for one in found] == [("ready", "3", "0.5.17")] * 2
    assert all(len(process.group(server.pid, server.born)) == 2 for server in started)
    assert serving.down(place.folder, say=place.said.append) == 2
    assert serving.status(place.folder) == [] and serving.down(place.folder) == 0
    assert all(process.group(server.pid, server.born) == [] for server in started)
    assert "is ready after" in "".join(place.said)


def test_a_second_start_takes_over_what_is_the_same_and_stops_the_rest(place: Place) -> None:
    first, second = place.start("good", "good")
    assert place.start("good") == [first], "the same launch"
    assert not second.alive, "of the same role and not wanted any more"
    (other,) = place.start("other")
    assert other.pid != first.pid and not first.alive


def test_a_server_that_a_dead_trainer_left_paused_is_taken_over(place: Place) -> None:
    (server,) = place.start("good")
    servers._ask(server, "/pause_generation", {})
    assert serving.status(place.folder)[0].state == "silent"
    assert place.start("good") == [server] and serving.status(place.folder)[0].state == "ready"


def test_a_role_leaves_the_servers_of_another_alone(place: Place) -> None:
    (policy,) = place.start("good")
    (judge,) = serving.start([Launch("judge-0", "/good")], place.folder, timeout_s=20, say=place.said.append)
    (changed,) = place.start("other")
    assert judge.alive and changed.alive and not policy.alive


@pytest.mark.parametrize(
    ("kind", "error", "told"),
    [
        ("dies", RunError, "RuntimeError: something broke"),
        ("oom", RunError, "out of memory: stop what else runs"),
        ("flag", UserError, "SGLang 0.5.17 does not take a flag of engine.flags .*--nonsense"),
        ("taken", RunError, r"its port was taken meanwhile.*\[Errno 98\]"),
        ("lacks", RunError, "the environment lacks a package: .*install.* again .*No module named 'sgl_kernel'"),
        ("nowhere", UserError, "its model cannot be loaded: give a folder .*'/nowhere'"),
        ("killed", RunError, "perhaps killed for lack of memory"),
    ],
)
def test_a_server_that_dies_at_start_tells_why_and_leaves_nothing(
    place: Place, kind: str, error: type[Exception], told: str
) -> None:
    with pytest.raises(error, match=told) as caught:
        place.start("good", kind)
    assert "policy-1" in str(caught.value) and "policy-1.log" in str(caught.value)
    assert serving.status(place.folder) == []


def test_a_server_that_never_gets_ready_is_stopped_after_the_limit(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(servers, "SAY_EVERY_S", 0.3)
    with pytest.raises(RunError, match=r"not ready after 2 s \(loading, /health answers 503\)"):
        place.start("slow", timeout_s=2.0)
    assert any("/health answers 503" in line for line in place.said)
    assert serving.status(place.folder) == []


def test_a_run_that_is_stopped_does_not_wait_for_its_servers_to_get_ready(place: Place) -> None:
    """Ctrl-C only set a flag, which was looked at when they were ready: up to ten minutes later."""

    def stopped() -> None:
        if any("waiting for" in line for line in place.said):
            raise RunError("stopped")

    section = EngineConfig(kind="sglang", start_timeout_s=20)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RunError, match="^stopped$"):
        patch.setattr(servers, "SAY_EVERY_S", 0.3)
        serving.up(section, "/slow", place.folder, say=place.said.append, check=stopped)
    assert serving.status(place.folder) == []


def test_a_damaged_list_of_servers_is_told(place: Place) -> None:
    place.folder.mkdir()
    (place.folder / "servers.json").write_text('[{"pid": 1}]')
    with pytest.raises(UserError, match="damaged or of another version"):
        serving.status(place.folder)
    (place.folder / "servers.json").unlink()


def test_a_server_that_ignores_sigterm_is_killed(place: Place) -> None:
    (server,) = place.start("stubborn")
    assert serving.down(place.folder) == 1 and process.group(server.pid, server.born) == []


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """As in a terminal: what a shell starts in the background ignores SIGINT, and so do its children."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("ended_by", ["down", "a start that fails"])
def test_ctrl_c_while_servers_are_stopped_waits_until_they_are(place: Place, ended_by: str) -> None:
    """They ignore SIGTERM for a second, and Ctrl-C comes in the middle of it."""
    started = place.start("stubborn", "stubborn")
    told = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    told.start()
    with pytest.raises(KeyboardInterrupt):
        if ended_by == "down":
            serving.down(place.folder)
        else:
            place.start("stubborn", "stubborn", "killed")
    told.join()
    assert serving.status(place.folder) == [] and not any(server.alive for server in started)


def test_a_port_that_is_taken_is_told_and_nothing_starts(place: Place) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=f"cannot listen on 127.0.0.1:{port}"):
            place.start("good", port=port)
    (server,) = place.start("good", port=port)
    assert server.url == f"http://127.0.0.1:{port}"


def test_a_server_of_somebody_else_on_the_port_is_not_taken_for_ours(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two runs with the same --port found it free; the server of the one that was quicker answered both."""
    (other,) = serving.start([Launch("policy-0", "/good")], tmp_path / "other", timeout_s=20, say=place.said.append)
    port = int(other.url.rpartition(":")[2])
    try:
        monkeypatch.setattr(servers, "_free_ports", lambda wanted: {"policy-0": port})
        with pytest.raises(RunError, match="its port was taken meanwhile"):
            place.start("slower", port=port)
        assert other.alive and serving.status(place.folder) == []
    finally:
        serving.down(tmp_path / "other")


def test_a_folder_that_was_given_relatively_is_the_same_from_everywhere(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Elsewhere the log and the key's file of its servers were looked for below the wrong folder."""
    monkeypatch.setenv(KEY_VARIABLE, "k")
    monkeypatch.chdir(tmp_path)
    serving.start([Launch("policy-0", "/good")], Path("servers"), timeout_s=20, say=place.said.append)
    monkeypatch.chdir("/")
    write_key(place.folder, Launch("policy-0", "/good"))  # as a start that was killed leaves it
    assert Path(serving.status(place.folder)[0].server.log).is_file()
    assert serving.down(place.folder) == 1 and not list(place.folder.glob(".*.yaml"))


def test_what_ran_before_is_stopped_too_when_the_rest_cannot_start(place: Place) -> None:
    """It would be in no list any more."""
    (server,) = place.start("good")
    with socket.socket() as other, pytest.raises(UserError, match="cannot listen on"):
        other.bind(("127.0.0.1", 0))
        other.listen()
        wanted = [server.launch, Launch("policy-1", "/good", port=other.getsockname()[1])]
        serving.start(wanted, place.folder, timeout_s=20, say=place.said.append)
    assert not server.alive and serving.status(place.folder) == []


def test_a_proxy_for_other_hosts_is_not_asked(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    place.start("good")
    assert serving.status(place.folder)[0].state == "ready"


def test_a_dead_server_is_started_again_where_it_was_and_not_for_ever(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    (server,) = place.start("good")
    restart = partial(servers._restart, place.folder, timeout_s=20, say=place.said.append, check=lambda: None)
    monkeypatch.setattr(servers, "MAX_RESTARTS", 1)
    os.kill(server.pid, signal.SIGKILL)
    wait_until_dead(server)
    assert serving.status(place.folder)[0].state == "dead"
    restart(server)
    (after,) = serving.status(place.folder)
    assert after.state == "ready" and after.server.url == server.url and after.server.restarts == 1
    assert process.group(server.pid, server.born) == [], "its child was left over"
    restart(server)
    assert after.server.alive and [one.server for one in serving.status(place.folder)] == [after.server], "seen to"
    os.kill(after.server.pid, signal.SIGKILL)
    wait_until_dead(after.server)
    with pytest.raises(RunError, match="died 2 times"):
        restart(after.server)


def test_a_server_that_no_list_can_take_is_not_left_running(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk was full between its start and the list."""
    (server,) = place.start("good")
    os.kill(server.pid, signal.SIGKILL)
    wait_until_dead(server)
    spawned, spawn = [], servers._spawn
    with monkeypatch.context() as patch, pytest.raises(OSError, match="full"):
        patch.setattr(servers, "_spawn", lambda *what: spawned.append(spawn(*what)) or spawned[0])  # type: ignore[func-returns-value]
        patch.setattr(servers, "_write", lambda *what: (_ for _ in ()).throw(OSError(28, "full")))
        servers._restart(place.folder, server, 20.0, place.said.append, lambda: None)
    assert not spawned[0].alive


def test_watching_starts_the_dead_again(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "WATCH_EVERY_S", 0.05)
    (server,) = place.start("good")
    with serving.watched(place.folder, say=place.said.append):
        os.kill(server.pid, signal.SIGKILL)
        wait_until_dead(server)
        until = time.monotonic() + 10
        while sum("is ready after" in line for line in place.said) < 2 and time.monotonic() < until:
            time.sleep(0.05)
    (after,) = serving.status(place.folder)
    assert after.state == "ready" and after.server.restarts == 1


def test_the_end_of_watching_does_not_wait_for_a_server_that_is_being_started_again(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(servers, "WATCH_EVERY_S", 0.05)
    (server,) = place.start("once", model=str(tmp_path))
    with serving.watched(place.folder, say=place.said.append):
        os.kill(server.pid, signal.SIGKILL)
        until = time.monotonic() + 10
        while serving.status(place.folder)[0].server.pid == server.pid and time.monotonic() < until:
            time.sleep(0.05)
        started = time.monotonic()
    assert time.monotonic() - started < 5 and "stays away" not in "".join(place.said)
    assert serving.status(place.folder)[0].state == "dead", "nothing is left running"


def test_a_pid_that_belongs_to_another_process_by_now_is_left_alone(place: Place) -> None:
    assert not process.alive(os.getpid(), process.born(os.getpid()) + 1)
    assert not process.stop([(os.getpid(), process.born(os.getpid()) + 1)], 0.1)


def test_the_key_reaches_the_server_and_is_shown_to_nobody(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "it's secret")
    (server,) = place.start("good")
    log = Path(server.log)
    assert "api-key: 'it''s secret'" in log.read_text(), "the program prints what is in the file"
    assert stat.S_IMODE(log.stat().st_mode) == stat.S_IMODE((place.folder / "servers.json").stat().st_mode) == 0o600
    assert "secret" not in (place.folder / "servers.json").read_text() + "".join(place.said)
    assert "secret" not in Path(f"/proc/{server.pid}/cmdline").read_text()
    assert not list(place.folder.glob("*.yaml")), "the file is gone once the server has read it"
    monkeypatch.setenv(KEY_VARIABLE, "Traceback")  # printed by the program that dies
    with pytest.raises(RunError, match=r"\*\*\*") as caught:
        place.start("dies")
    assert "Traceback" not in str(caught.value)


def test_an_environment_that_is_not_there_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(install.PYTHON_VARIABLE, raising=False)
    monkeypatch.setenv("OMNI_FAST_HOME", str(tmp_path))
    with pytest.raises(UserError, match="omni-fast engine install --cpu"):
        install.python("cpu")
    folder = tmp_path / f"engine-{install.VERSION}-cpu"
    folder.mkdir()
    stamp = {"pins": "of other pins", "seconds": 1.0, "bytes": 1}
    (folder / install.STAMP).write_text(json.dumps(stamp))
    assert install.installed("cpu") is None, "a stamp of other pins does not count"
    (folder / install.STAMP).write_text("")
    assert install.installed("cpu") is None, "nor does one that a kill cut off"


def test_pip_that_fails_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMNI_FAST_HOME", str(tmp_path))
    monkeypatch.setattr(install, "_run", refusing(install._run))
    with pytest.raises(RunError, match="looking for torch==.* failed: .*no index here"):
        install.install("cpu", lambda line: None)
    assert install.installed("cpu") is None


def refusing(run):  # type: ignore[no-untyped-def]
    """Its commands as they are, save pip, which fails."""

    def instead(command: list[str], deadline: float, what: str) -> str:
        fails = [sys.executable, "-c", "import sys; sys.exit('no index here')"]
        return run(fails if "pip" in command else command, deadline, what)  # type: ignore[no-any-return]

    return instead


def test_the_pip_of_a_killed_installation_ends_with_it(tmp_path: Path) -> None:
    """It went on writing into the folder that the next installation had emptied."""
    told = tmp_path / "pid"
    pip = ["sh", "-c", f"echo $$ > {told}.now; mv {told}.now {told}; exec sleep 60"]
    lines = f"from omni_fast.serving import install; install._run({pip}, 1e5, 'installing')"
    installing = subprocess.Popen([sys.executable, "-c", lines])
    until = time.monotonic() + 30
    while not told.exists() and time.monotonic() < until:
        time.sleep(0.02)
    child = int(told.read_text())
    born = process.born(child)
    assert process.alive(child, born)
    installing.kill()
    installing.wait()
    while process.alive(child, born) and time.monotonic() < until:
        time.sleep(0.02)
    assert not process.alive(child, born)


texts = st.text(st.characters(codec="ascii", exclude_categories=["Cc"]), min_size=1, max_size=12)


@settings(deadline=None, max_examples=50)
@given(st.lists(texts.filter(lambda text: not text.startswith(("--api-key", "--host", "--port"))), max_size=6))
def test_flags_reach_sglang_untouched_and_last(flags: list[str]) -> None:
    (launch,) = launches("policy", "/model", "cpu", "float32", flags, 1)
    made = command(launch, Path("/python"), 1234, None)
    assert made[len(made) - len(flags) :] == flags
    assert made[:3] == ["/python", "-m", "sglang.launch_server"] and made[made.index("--port") + 1] == "1234"
    assert made[made.index("--host") + 1] == "127.0.0.1" and made[made.index("--dtype") + 1] == "float32"


def test_host_port_and_gpu_are_spread_over_the_servers() -> None:
    made = launches("policy", "/model", "cuda", "auto", ["--host=0.0.0.0", "--tp", "1", "--port", "3000"], 3)
    assert [(one.name, one.host, one.port) for one in made] == [(f"policy-{i}", "0.0.0.0", 3000 + i) for i in range(3)]
    assert [one.flags for one in made] == [("--tp", "1", "--base-gpu-id", str(i)) for i in range(3)]
    wide = launches("policy", "/model", "cuda", "auto", ["--tp-size=2", "--base-gpu-id", "4"], 2)
    assert [one.flags for one in wide] == [("--tp-size=2", "--base-gpu-id", "4"), ("--tp-size=2", "--base-gpu-id", "6")]
    (alone,) = launches("policy", "/model", "cuda", "auto", ["--base-gpu-id", "4"], 1)
    assert alone.flags == ("--base-gpu-id", "4")
    with pytest.raises(UserError, match="--base-gpu-id x is no number"):
        launches("policy", "/model", "cuda", "auto", ["--base-gpu-id", "x"], 2)
    for wrong in (["--port", "x"], ["--port"], ["--port", "65535"], ["--api-key", "k"], ["--api-key=k"]):
        with pytest.raises(UserError, match=r"engine\.flags"):
            launches("policy", "/model", "cpu", "auto", wrong, 2)


def test_the_environment_of_a_cpu_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launch = Launch("policy-0", str(tmp_path))
    ranks = "RANK LOCAL_RANK WORLD_SIZE GROUP_WORLD_SIZE ROLE_NAME MASTER_ADDR TORCHELASTIC_USE_AGENT_STORE".split()
    told = {"PYTHONPATH": "/trainer", KEY_VARIABLE: "k", "PATH": "/bin", "LOCAL_SCRATCH": "/tmp"}
    made = environment(launch, told | dict.fromkeys(ranks, "1"))
    assert not made.keys() & {*ranks} and made["LOCAL_SCRATCH"] == "/tmp", "it is no rank of the trainer's"
    assert made["PYTHONPATH"] == str(SHIM) and made["PATH"] == "/bin" and KEY_VARIABLE not in made
    assert made["OMP_NUM_THREADS"] == made["SGLANG_USE_CPU_ENGINE"] == made["HF_HUB_OFFLINE"] == "1"
    assert {path.parent.name for path in SHIM.glob("*/__init__.py")} == {"triton", "sgl_kernel"}
    assert "HF_HUB_OFFLINE" not in environment(Launch("policy-0", "of/the-hub"), {})
    monkeypatch.setenv(KEY_VARIABLE, "k")
    with pytest.raises(UserError, match="one --config"):
        write_key(tmp_path, Launch("policy-0", "/model", flags=("--config", "mine.yaml")))


def test_the_commands_start_show_and_stop(place: Place, tmp_path: Path) -> None:
    config = tmp_path / "run.toml"
    config.write_text(
        '[model]\npath = "/good"\n[engine]\nkind = "sglang"\nservers = 2\n[[tasks]]\nname = "m"\nkind = "math"\n'
    )
    engine, where = ["engine"], ["--folder", str(place.folder)]
    up = CliRunner().invoke(app, [*engine, "up", str(config), "--judge", "/good", *where], catch_exceptions=False)
    urls = [one.server.url for one in serving.status(place.folder)]
    assert (
        len(urls) == 3
        and f"engine.urls={json.dumps(urls[:2])}" in up.stdout
        and f'judge.url="{urls[2]}/v1"' in up.stdout
    )
    shown = CliRunner().invoke(app, [*engine, "status", "--json", *where], catch_exceptions=False)
    assert [row["state"] for row in json.loads(shown.stdout)] == ["ready"] * 3
    os.kill(serving.status(place.folder)[1].server.pid, signal.SIGKILL)
    wait_until_dead(serving.status(place.folder)[1].server)
    with pytest.raises(RunError, match="not all servers answer"):
        CliRunner().invoke(app, [*engine, "status", *where], catch_exceptions=False)
    down = CliRunner().invoke(app, [*engine, "down", *where], catch_exceptions=False)
    assert serving.status(place.folder) == [] and "servers stopped" in down.stdout
