"""What `omni-fast launch` prints: parsed by bash and by the Kubernetes schema, run with stand-ins for Slurm and omni-fast."""

from __future__ import annotations

import json
import os
import signal
import string
import subprocess
import time
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from omni_fast.errors import UserError
from omni_fast.launch import MOUNT, Kind, Place, render

PODS = Place(nodes=2, image="trainer:1", server_image="sglang:1", claim="data")
SGLANG = 'engine.kind="sglang"'
HUB = "model.path=Qwen/Qwen2.5-7B-Instruct"
# Nothing that no file name, override or shell word could hold.
text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=30)

# Says what it was called with, one JSON line a call; `train` ends with the code in $CODE, or when it is told to.
STAND_IN = """#!/usr/bin/env python3
import json, os, signal, sys, time
def stop(*_):
    print("saved", flush=True)
    sys.exit(130)
signal.signal(signal.SIGTERM, stop)
with open(os.environ["CALLS"], "a") as calls:
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES")
    calls.write(json.dumps({"gpus": gpus, "node": os.environ.get("NODE"), "words": sys.argv[1:]}) + "\\n")
if sys.argv[1] == "train":
    time.sleep(float(os.environ.get("WORK_S", "1")))
    sys.exit(int(os.environ.get("CODE", "0")))
"""
SRUN = """#!/usr/bin/env bash
while [[ "$1" == --* ]]; do [[ "$1" == --nodelist=* ]] && export NODE="${1#*=}"; shift; done
exec "$@"
"""


def test_scripts_parse(tmp_path: Path) -> None:
    for kind in ("slurm", "local"):
        for overrides in ([SGLANG], [SGLANG, 'engine.flags=["--tp-size", "2"]'], []):
            script = render(kind, "quickstart", overrides, Place())
            _parses(script)
            assert script.startswith("#!")


def test_manifest_has_the_schema_of_kubernetes() -> None:
    validate = pytest.importorskip("kubernetes_validate").validate
    for overrides in ([SGLANG, HUB], [HUB]):
        place = (
            PODS if SGLANG in overrides else Place(1, 0, 1, image="trainer:1", server_image="sglang:1", claim="data")
        )
        documents = list(yaml.safe_load_all(render("k8s", "quickstart", overrides, place)))
        assert documents[-1]["kind"] == "Job"
        for document in documents:
            validate(document, "1.31", strict=True)


def test_schema_is_able_to_fail() -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    job = list(yaml.safe_load_all(render("k8s", "quickstart", [HUB], Place(1, 0, 1, "", (), "a", "b", "c"))))[-1]
    job["spec"]["template"]["spec"]["containers"][0]["comand"] = ["train"]
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, "1.31", strict=True)


@settings(deadline=None, max_examples=30)
@given(text, text)
def test_hostile_words_stay_words(value: str, run: str) -> None:
    override = f"tasks.math.system={json.dumps(value, ensure_ascii=False)}"
    try:
        script = render("local", "quickstart", [override], Place(run=run))
    except UserError:
        return  # not TOML, or not a value: refused
    # bash itself says what the words are
    done = subprocess.run(
        ["bash", "-c", script.replace("exec omni-fast", "printf '%s\\0'")], capture_output=True, check=True, timeout=20
    )
    words = done.stdout.decode().split("\0")
    assert words == ["train", "--run", os.path.expanduser(run) or "runs/quickstart", "--", "quickstart", override, ""]


@settings(deadline=None, max_examples=100)
@given(text, text, text)
def test_hostile_words_stay_scalars(value: str, run: str, image: str) -> None:
    override = f"tasks.math.system={json.dumps(value, ensure_ascii=False)}"
    place = Place(1, 1, 1, f"{MOUNT}/{run}", (), image or "i", "s", "c")
    try:
        manifest = render("k8s", "quickstart", [HUB, override], place)
    except UserError:
        return
    job = list(yaml.safe_load_all(manifest))[-1]
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert container["image"] == place.image
    words = [word.replace("$$", "$") for word in container["command"]]
    assert "$" not in "".join(container["command"]).replace("$$", "")
    assert words[:2] == ["omni-fast", "train"] and words[-1] == override
    assert words[3].startswith(f"{MOUNT}/")


@settings(deadline=None, max_examples=60)
@given(st.text(string.printable, max_size=20), st.sampled_from(["slurm", "k8s", "local"]))
def test_names_of_files_are_names_everywhere(stem: str, kind: Kind) -> None:
    from omni_fast.launch import _name

    name = _name(f"folder/{stem}.toml")
    assert name and len(name) <= 40 and set(name) <= set(string.ascii_lowercase + string.digits + "-")
    assert name[0] != "-" and name[-1] != "-"


def test_no_key_is_rendered(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("OMNI_FAST_ENGINE_KEY", "OMNI_FAST_JUDGE_KEY", "HF_TOKEN"):
        monkeypatch.setenv(variable, "s3cret-key")
    for kind in ("slurm", "local", "k8s"):
        rendered = render(kind, "quickstart", [SGLANG, HUB], PODS if kind == "k8s" else Place())
        assert "s3cret-key" not in rendered
        assert "OMNI_FAST_ENGINE_KEY" in rendered
    for override in (
        'engine.flags=["--api-key", "s3cret-key"]',
        'judge.url="http://me:s3cret-key@host/v1"',
        'engine.urls=["http://s3cret-key@host:30000"]',
    ):
        with pytest.raises(UserError, match="OMNI_FAST_(ENGINE|JUDGE)_KEY") as refused:
            render("slurm", "quickstart", [SGLANG, override], Place())
        assert "s3cret-key" not in str(refused.value)


@pytest.mark.parametrize(
    ("kind", "overrides", "place", "message"),
    [
        ("local", [SGLANG], Place(nodes=2), "one host"),
        ("slurm", [], Place(nodes=2), "engine.kind=sglang"),
        ("slurm", [SGLANG], Place(gpus_per_node=1), "no room"),
        ("slurm", [SGLANG], Place(gpus_per_node=8, trainer_gpus=8), "no room"),
        ("slurm", [SGLANG], Place(gpus_per_node=8, trainer_gpus=9), "first node"),
        ("slurm", [SGLANG, 'engine.flags=["--tp", "16"]'], Place(nodes=2), "no room"),
        ("slurm", [SGLANG, 'engine.flags=["--tp", "x"]'], Place(nodes=2), "no number"),
        ("slurm", [SGLANG, 'engine.flags=["--tp"]'], Place(nodes=2), "no value"),
        ("slurm", [SGLANG, 'engine.flags=["--port=1"]'], Place(nodes=2), "leave it to the script"),
        ("slurm", [SGLANG, "engine.sync=tensor"], Place(nodes=2), "engine.sync=disk"),
        ("slurm", [SGLANG], Place(lines=("--account=a\nrm -rf /",)), "no line break"),
        ("slurm", [SGLANG], Place(lines=("--comment=a b",)), "no space"),
        ("local", [SGLANG], Place(lines=("--account=a",)), "--print slurm"),
        ("local", [SGLANG], Place(image="a"), "--image"),
        ("k8s", [SGLANG], PODS, "Hugging Face id"),
        ("k8s", [HUB], Place(claim="c"), "--image, --server-image"),
        ("k8s", [HUB, SGLANG], Place(2, run="/elsewhere", image="a", server_image="b", claim="c"), "below /data"),
        ("k8s", [HUB, SGLANG], Place(2, run="/data/../etc", image="a", server_image="b", claim="c"), "below /data"),
    ],
)  # fmt: skip
def test_what_cannot_run_is_refused(kind: Kind, overrides: list[str], place: Place, message: str) -> None:
    with pytest.raises(UserError, match=message):
        render(kind, "quickstart", overrides, place)


def test_a_home_that_the_shell_left_alone_is_one_folder() -> None:
    """Servers wrote into a folder named ~, the trainer into the home."""
    assert f"run={Path.home()}/x" in render("local", "quickstart", [SGLANG], Place(run="~/x")).splitlines()


def test_pods_of_a_file(tmp_path: Path) -> None:
    config = tmp_path / "My Run.toml"
    config.write_text('model.path = "/data/$(KEY)"\nengine.kind = "sglang"\n[[tasks]]\nname = "math"\nkind = "math"\n')
    documents = {document["kind"]: document for document in yaml.safe_load_all(render("k8s", str(config), [], PODS))}
    assert documents["ConfigMap"]["data"] == {"my-run.toml": config.read_text()}
    servers = documents["StatefulSet"]["spec"]
    assert servers["replicas"] == 15  # 16 GPUs, one of which trains
    (server,) = servers["template"]["spec"]["containers"]
    assert "/data/$$(KEY)" in server["args"]  # Kubernetes would put the key there
    (trainer,) = documents["Job"]["spec"]["template"]["spec"]["containers"]
    urls = tomllib.loads(trainer["command"][-1])["engine"]["urls"]
    assert len(urls) == 15 and urls[14] == "http://my-run-policy-14.my-run-policy:30000"
    assert documents["Service"]["metadata"]["name"] == servers["serviceName"] == "my-run-policy"


@pytest.fixture
def stand_ins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`omni-fast`, `srun` and `scontrol` that say what they were called with. Returns the file they say it in."""
    scontrol = "#!/usr/bin/env bash\nprintf 'node-a\\nnode-b\\n'\n"
    (tmp_path / "bin").mkdir()
    for name, script in (("omni-fast", STAND_IN), ("srun", SRUN), ("scontrol", scontrol)):
        path = tmp_path / "bin" / name
        path.write_text(script)
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    monkeypatch.setenv("SLURM_JOB_NODELIST", "node-[a-b]")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "calls"


def test_slurm_script_runs(stand_ins: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CODE", "7")
    script = render("slurm", "quickstart", [SGLANG, 'engine.flags=["--tp=2", "it\'s"]'], Place(2, 4))
    assert _run(script).wait(30) == 7
    up, train = _calls(stand_ins)
    assert [(call["node"], call["gpus"], call["port"]) for call in up] == [
        ("node-a", "1,2", "30001"), ("node-b", "0,1", "30000"), ("node-b", "2,3", "30002")
    ]  # fmt: skip
    assert all(call["flags"][:2] == ["--tp=2", "it's"] and call["flags"][3] == "0.0.0.0" for call in up)
    assert (train["node"], train["gpus"]) == ("node-a", "0")
    assert train["urls"] == ["http://node-a:30001", "http://node-b:30000", "http://node-b:30002"]


def test_several_gpus_train_by_torchrun(stand_ins: Path) -> None:
    (stand_ins.parent / "bin" / "torchrun").write_text(
        '#!/usr/bin/env bash\necho "$@" >"$CALLS.torchrun"\nshift 6\nexec omni-fast "$@"\n'
    )
    (stand_ins.parent / "bin" / "torchrun").chmod(0o755)
    script = render("slurm", "quickstart", [SGLANG], Place(2, 4, trainer_gpus=2))
    assert _run(script).wait(30) == 0
    up, train = _calls(stand_ins)
    assert [call["gpus"] for call in up] == ["2", "3", "0", "1", "2", "3"] and train["gpus"] == "0,1"
    assert (
        Path(f"{stand_ins}.torchrun")
        .read_text()
        .startswith(
            "--standalone --nproc-per-node=2 --max-restarts=3 -m -- omni_fast train --run runs/quickstart -- quickstart"
        )
    )
    (container,) = list(yaml.safe_load_all(render("k8s", "quickstart", [SGLANG, HUB], replace(PODS, trainer_gpus=2))))[-1][
        "spec"]["template"]["spec"]["containers"]  # fmt: skip
    assert container["command"][:2] == ["torchrun", "--standalone"]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 2}


def test_local_script_runs_and_stops_its_servers(stand_ins: Path) -> None:
    assert _run(render("local", "quickstart", [SGLANG], Place(1, 3))).wait(30) == 0
    up, train = _calls(stand_ins)
    assert [(call["gpus"], call["port"]) for call in up] == [("1", "30001"), ("2", "30002")]
    assert train["gpus"] == "0" and len(train["urls"]) == 2
    down = [call["words"] for call in map(json.loads, stand_ins.read_text().splitlines()) if call["words"][1] == "down"]
    assert down == [["engine", "down", "--folder", f"runs/quickstart/engine/{port}"] for port in (30001, 30002)]


@pytest.mark.parametrize("kind", ["slurm", "local"])
def test_a_stop_reaches_the_trainer(kind: Kind, stand_ins: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORK_S", "60")
    running = _run(render(kind, "quickstart", [SGLANG], Place(1, 2)))
    until = time.monotonic() + 30
    while time.monotonic() < until and '"train"' not in (stand_ins.read_text() if stand_ins.exists() else ""):
        time.sleep(0.05)
    time.sleep(0.3)  # the script is to have set its trap
    running.send_signal(signal.SIGTERM)
    out, _ = running.communicate(timeout=30)
    assert running.returncode == 130 and "saved" in out


def _parses(script: str) -> None:
    subprocess.run(["bash", "-n"], input=script.encode(), check=True, timeout=20)


def _run(script: str) -> subprocess.Popen[str]:
    return subprocess.Popen(["bash", "-c", script], stdout=subprocess.PIPE, text=True, start_new_session=True)


def _calls(path: Path) -> tuple[list[dict], dict]:
    """What the servers were started with, in the order of node and port, and what the trainer was."""
    calls = [json.loads(line) for line in path.read_text().splitlines()]
    up = [call for call in calls if call["words"][:2] == ["engine", "up"]]
    for call in up:
        assert call["words"][-2] == "engine.servers=1"
        call["flags"] = tomllib.loads(call["words"][-1])["engine"]["flags"]
        call["port"] = call["flags"][-1]
    (train,) = [call for call in calls if call["words"][0] == "train"]
    train["urls"] = tomllib.loads(train["words"][-1])["engine"]["urls"]
    return sorted(up, key=lambda call: (call["node"] or "", call["port"])), train
