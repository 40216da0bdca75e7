"""Start SGLang servers, wait until they answer, look at them, start them again, stop them; from any process.

    FOLDER/servers.json    what was started here: launch, url, pid and time of birth, version (mode 0600)
    FOLDER/NAME.log        of each server; SGLang writes its API key into it, so only this user can read it (mode 0600)

`up` is safe to repeat: a server of the same launch that answers is taken over, with whatever weights it has; any other
of its role is stopped first. A process that dies leaves its servers running: `up` and `down` on the folder find them.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from subprocess import DEVNULL, Popen
from types import FrameType
from typing import Literal

import httpx
from pydantic import TypeAdapter, ValidationError

from omni_fast.config import EngineConfig
from omni_fast.errors import RunError, UserError
from omni_fast.policy.cache import SAY_EVERY_S, alone
from omni_fast.serving import process
from omni_fast.serving.install import VERSION, Say, default_device, python
from omni_fast.serving.launch import KEY_VARIABLE, Launch, adapter_flags, command, environment, launches, write_key

STATE = "servers.json"
START_TIMEOUT_S = 600.0
STOP_GRACE_S = 20.0
PROBE_TIMEOUT_S = 10.0
PORT_TIMEOUT_S = 30.0
WATCH_EVERY_S = 1.0
MAX_RESTARTS = 10
LOG_LINES, LOG_COLUMNS = 12, 300
# What the log of a server that did not start says; whose mistake that is, and what to do about it.
CAUSES = (
    (
        r"out of memory|OutOfMemory|Not enough memory|MemoryError|Cannot allocate memory|bad_alloc|leave no GPU memory",
        RunError,
        "out of memory: stop what else runs there, change --mem-fraction-static or --max-total-tokens in engine.flags as said, or serve a smaller model",
    ),
    ("[aA]ddress already in use", RunError, "its port was taken meanwhile: give another, or none for a free one"),
    (
        r"^\w+Error: .*(Repo id must|couldn't connect|valid model identifier|Unrecognized model|have a file named)",
        UserError,
        "its model cannot be loaded: give a folder as transformers saves it, or a Hugging Face id that this machine reaches",
    ),
    ("error: (unrecognized|argument|ambiguous) ", UserError, f"SGLang {VERSION} does not take a flag of engine.flags"),
    (
        "ModuleNotFoundError",
        RunError,
        "the environment lacks a package: delete it, `omni-fast engine install` it again",
    ),
)


@dataclass(frozen=True, slots=True)
class Server:
    """One that was started. version: SGLang's, empty until it answered. restarts: after a death, of the same launch."""

    launch: Launch
    url: str
    pid: int
    born: int
    log: str
    version: str = ""
    restarts: int = 0

    @property
    def alive(self) -> bool:
        return process.alive(self.pid, self.born)


KNOWN = TypeAdapter(list[Server])


@dataclass(frozen=True, slots=True)
class Status:
    """What a server says now. weight_version: as its last sync named it."""

    server: Server
    state: Literal["ready", "starting", "silent", "dead"]
    weight_version: str = ""


def up(
    section: EngineConfig, model_folder: Path | str, folder: Path, *, role: str = "policy", adapter_rank: int = 0,
    say: Say = print, check: Callable[[], None] = lambda: None,
) -> list[str]:  # fmt: skip
    """Start `section.servers` servers of one model and wait until all answer; their URLs, in order.

    folder: logs and state. adapter_rank: of the LoRA adapters that they shall take. check: called while it waits, raises to
    end that. Raises UserError for what the config can mend, RunError otherwise; nothing is left running then.
    """
    device = default_device()
    saver = ["--enable-memory-saver"] if section.sleep and device == "cuda" else []  # a CPU has nothing to give back
    flags = [*adapter_flags(adapter_rank, device), *saver, *section.flags]
    wanted = launches(role, str(model_folder), device, section.dtype, flags, section.servers)
    return [server.url for server in start(wanted, folder, timeout_s=section.start_timeout_s, say=say, check=check)]


def start(
    wanted: Sequence[Launch], folder: Path, *, timeout_s: float = START_TIMEOUT_S, say: Say = print,
    check: Callable[[], None] = lambda: None,
) -> list[Server]:  # fmt: skip
    """As `up`, for given launches of one role, whose names begin with it."""

    def waiting(line: str) -> None:
        check()
        say(line)

    with _locked(folder, timeout_s, waiting):
        known, role = {server.launch.name: server for server in _read(folder)}, wanted[0].name.rpartition("-")[0]
        others = [server for name, server in known.items() if name.rpartition("-")[0] != role]
        running = {launch.name: server for launch in wanted if (server := _same(known.get(launch.name), launch))}
        for server in _stop(server for server in known.values() if server not in [*others, *running.values()]):
            say(f"stopped {server.launch.name} of an earlier start")
        started: dict[str, Server] = {}
        try:
            ports = _free_ports([launch for launch in wanted if launch.name not in running])
            for launch in wanted:
                with _undisturbed():  # or it would run and be in no list
                    started[launch.name] = running.get(launch.name) or _spawn(launch, folder, ports[launch.name])
                    _write(folder, [*others, *started.values()])
            for name, server in started.items():
                if name in running:
                    say(f"{name} at {server.url} runs already: taken over")
                else:
                    started[name] = _wait(server, timeout_s, say, check)
                    _write(folder, [*others, *started.values()])
        except BaseException:
            with _undisturbed():
                _stop((running | started).values())
                _write(folder, others)
            raise
        return list(started.values())


def _restart(folder: Path, dead: Server, timeout_s: float, say: Say, check: Callable[[], None]) -> None:
    """The same launch again at the same address, unless somebody else has seen to it meanwhile.

    It has the weights of its model folder then: sync before using it. RunError when it does not come up, or died too often.
    """
    with _locked(folder, timeout_s, say):
        servers = _read(folder)
        if dead not in servers:
            return
        name = dead.launch.name
        if dead.restarts >= MAX_RESTARTS:
            raise RunError(f"{name} died {MAX_RESTARTS + 1} times; {_last_words(dead)}")
        say(f"{name} at {dead.url} died and is started again (its last log: {dead.log}.{dead.restarts})")
        _stop([dead])  # children that outlived it
        here = replace(dead.launch, port=int(dead.url.rpartition(":")[2]))
        port = _free_ports([here], PORT_TIMEOUT_S)[name]  # a killed process can hold it until its memory is freed
        Path(dead.log).rename(f"{dead.log}.{dead.restarts}")
        place = servers.index(dead)
        servers[place] = fresh = replace(_spawn(dead.launch, folder, port), restarts=dead.restarts + 1)
        try:
            _write(folder, servers)
            servers[place] = _wait(fresh, timeout_s, say, check)
            _write(folder, servers)
        except BaseException:
            _stop([fresh])
            raise


@contextmanager
def watched(folder: Path, *, timeout_s: float = START_TIMEOUT_S, say: Say = print) -> Iterator[None]:
    """While inside, a thread starts servers of the folder again when they die; it tells what it cannot start, and goes on.

    Whoever uses them sees a server that is away, and later one that is back with the weights of its model folder.
    """
    stopping = threading.Event()

    def check() -> None:
        if stopping.is_set():
            raise RunError("the run ends")

    def look() -> None:
        given_up: set[str] = set()
        while not stopping.wait(WATCH_EVERY_S):
            for server in _read(folder):
                if server.version and server.url not in given_up and not server.alive:
                    try:
                        _restart(folder, server, timeout_s, say, check)
                    except (RunError, UserError, OSError) as error:
                        given_up.add(server.url)
                        if not stopping.is_set():
                            say(f"{server.launch.name} stays away: {error}")

    thread = threading.Thread(target=look, name="watching engine servers", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopping.set()
        thread.join(PROBE_TIMEOUT_S + STOP_GRACE_S)  # of a server that is being started again


def status(folder: Path) -> list[Status]:
    """Every server that was started here and not stopped by `down`."""
    return [_status(server) for server in _read(folder)]


def down(folder: Path, *, say: Say = print) -> int:
    """Stop all servers, by SIGTERM, then SIGKILL; how many were running."""
    with _locked(folder, START_TIMEOUT_S, say):
        with _undisturbed():
            stopped = _stop(_read(folder))
            _write(folder, [])
        for server in stopped:
            say(f"stopped {server.launch.name} at {server.url}")
    return len(stopped)


def kill(folder: Path) -> None:
    """Without a word or a lock, which whoever is interrupted may hold: for a run that is left at once."""
    process.stop(((server.pid, server.born) for server in _read(folder)), 0.0)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Ctrl-C and SIGTERM wait until what is inside is done, which is soon: in the middle of it they would leave servers
    running."""
    held: list[int] = []

    def hold(number: int, frame: FrameType | None) -> None:
        held.append(number)

    main = threading.current_thread() is threading.main_thread()  # no other thread is interrupted
    before = {number: signal.signal(number, hold) for number in (signal.SIGINT, signal.SIGTERM) if main}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        for late in held:
            signal.raise_signal(late)


def _spawn(launch: Launch, folder: Path, port: int) -> Server:
    log = folder.absolute() / f"{launch.name}.log"  # `status` and `down` may be asked in another folder
    log.unlink(missing_ok=True)
    arguments, env = (
        command(launch, python(launch.device), port, write_key(folder, launch)),
        environment(launch, os.environ),
    )
    with os.fdopen(os.open(log, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as sink:
        child = Popen(arguments, stdin=DEVNULL, stdout=sink, stderr=sink, env=env, start_new_session=True)
    child.returncode = 0  # collected by pid, perhaps by another process: the object must not warn about it
    reachable = "127.0.0.1" if launch.host == "0.0.0.0" else launch.host
    return Server(launch, f"http://{reachable}:{port}", child.pid, process.born(child.pid), str(log))


def _wait(server: Server, timeout_s: float, say: Say, check: Callable[[], None]) -> Server:
    """Until /health answers 200; a connection refused and then 503 are the normal way there."""
    name, started, told = server.launch.name, time.monotonic(), 0.0
    while True:
        if not server.alive:
            raise _death(server)
        check()
        answer, _ = _ask(server, "/health")
        waited = time.monotonic() - started
        if answer == 200 and process.listens(server.pid, server.born, int(server.url.rpartition(":")[2])):
            break  # it is ours: whoever looked for a free port in the same minute may have been quicker
        what = f"loading, /health answers {answer}" if answer else "importing, nothing listens yet"
        if waited > timeout_s:
            late = f"{name} was not ready after {timeout_s:.0f} s ({what})"
            raise RunError(f"{late}: raise engine.start_timeout_s; {_last_words(server)}")
        if waited - told >= SAY_EVERY_S:
            told = waited
            say(f"waiting for {name} at {server.url} ({what}; {waited:.0f} of at most {timeout_s:.0f} s)")
        time.sleep(0.3)
    _key_file(server).unlink(missing_ok=True)
    version = str(_ask(server, "/server_info")[1].get("version", "unknown"))
    say(f"{name} at {server.url} is ready after {waited:.0f} s: SGLang {version}, {server.launch.model}")
    return replace(server, version=version)


def _death(server: Server) -> UserError | RunError:
    """What a server that died while starting died of."""
    name, log = server.launch.name, _log(server)
    for pattern, kind, remedy in CAUSES:
        for line in filter(re.compile(pattern).search, log.splitlines()):
            return kind(f"{name} did not start, {remedy} ({line.strip()[:LOG_COLUMNS]}); log: {server.log}")
    how = "died while starting" if "Traceback" in log else "ended while starting, perhaps killed for lack of memory"
    return RunError(f"{name} {how}; {_last_words(server)}")


def _last_words(server: Server) -> str:
    lines = [line[:LOG_COLUMNS] for line in _log(server).splitlines() if line.strip()]
    return f"the end of {server.log}:\n" + "\n".join(lines[-LOG_LINES:])


def _log(server: Server) -> str:
    """The log without the API key, which SGLang prints among its settings."""
    path = Path(server.log)
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    key = os.environ.get(KEY_VARIABLE)
    return text.replace(key, "***") if key else text


def _same(server: Server | None, launch: Launch) -> Server | None:
    """The server, if it is one of this launch, runs, and was ready."""
    if server is None or server.launch != launch or not server.version or not server.alive:
        return None
    _ask(server, "/continue_generation", {})  # one that a dead trainer left paused answers /health never
    return server if _ask(server, "/health")[0] == 200 else None


def _status(server: Server) -> Status:
    if not server.alive:
        return Status(server, "dead")
    if _ask(server, "/health")[0] != 200:
        return Status(server, "silent" if server.version else "starting")
    return Status(server, "ready", str(_ask(server, "/model_info")[1].get("weight_version", "")))


def _stop(servers: Iterable[Server]) -> list[Server]:
    """All of them at the same time; those that were running."""
    chosen = {(server.pid, server.born): server for server in servers}
    running = process.stop(chosen, STOP_GRACE_S)
    for server in chosen.values():
        _key_file(server).unlink(missing_ok=True)
    return [chosen[one] for one in running]


def _key_file(server: Server) -> Path:
    return Path(server.log).with_name(f".{server.launch.name}-key.yaml")


def _free_ports(wanted: Sequence[Launch], patience_s: float = 0.0) -> dict[str, int]:
    """Name -> port: the given one, which must be or become free, or one that is; all held at once, so they differ."""
    until = time.monotonic() + patience_s
    with ExitStack() as held:
        return {launch.name: _bind(held.enter_context(socket.socket()), launch, until) for launch in wanted}


def _bind(probe: socket.socket, launch: Launch, until: float) -> int:
    if launch.port:  # connections of a server that died do not count
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    while True:
        try:
            probe.bind((launch.host, launch.port))
            return int(probe.getsockname()[1])
        except OSError as error:
            if time.monotonic() >= until:
                where = f"{launch.name} cannot listen on {launch.host}:{launch.port} ({error.strerror})"
                raise UserError(f"{where}: stop what is there, or change --host or --port in engine.flags.") from error
            time.sleep(0.2)


def _ask(server: Server, path: str, body: dict[str, str] | None = None) -> tuple[int, dict[str, object]]:
    """Status and JSON object of the answer; 0 where there is none. Never by a proxy, which would see the key."""
    key = os.environ.get(KEY_VARIABLE)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    method, url = "GET" if body is None else "POST", server.url + path
    try:
        answer = httpx.request(method, url, json=body, headers=headers, timeout=PROBE_TIMEOUT_S, trust_env=False)
        return answer.status_code, dict(answer.json()) if answer.is_success and answer.content else {}
    except (httpx.HTTPError, ValueError):  # refused, reset, timed out, half an answer
        return 0, {}


def _read(folder: Path) -> list[Server]:
    path = folder / STATE
    try:
        return KNOWN.validate_json(path.read_bytes()) if path.is_file() else []
    except ValidationError:
        raise UserError(f"{path} is damaged or of another version: stop its servers by hand, and remove it.") from None


def _write(folder: Path, servers: Sequence[Server]) -> None:
    work = folder / f".{STATE}.writing"
    work.write_bytes(KNOWN.dump_json([*servers], indent=1))
    work.chmod(0o600)
    work.replace(folder / STATE)


def _locked(folder: Path, timeout_s: float, say: Say) -> AbstractContextManager[None]:
    """One starter or stopper of a folder's servers at a time."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"The folder {folder} for servers cannot be made ({error.strerror}): give another.") from error
    limit = timeout_s + STOP_GRACE_S
    return alone(folder / ".servers.lock", f"starting or stopping servers in {folder}", limit, say)
