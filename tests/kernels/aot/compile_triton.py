"""Compiles the Triton kernels for a GPU that need not be there, and prints what the machine code of each takes.

    python tests/kernels/aot/compile_triton.py 80|90|100 [WORDS]     one JSON object a line: case, kernel, registers, ...

WORDS: only cases with these words in their name.

The launchers of `backends/triton.py` run as they are, on small CPU tensors, with a driver that names the target and launches
nothing: so what is compiled is what they would launch there, specialised by the same rules.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from omni_kernels import LossSpec, Tokens
from omni_kernels.backends import triton as backend
from omni_kernels.losses import prepare

N = 4
LOSSES = {
    "clip": LossSpec(),
    "clip, KL, entropy, z": LossSpec(beta=0.1, entropy_coef=0.01, z_loss=0.01, dual_clip=3.0, rollout="truncate"),
    "cispo": LossSpec.preset("cispo"),
    "sapo, corrected KL": LossSpec.preset("sapo", beta=0.1, kl_correction=True),
    "reinforce": LossSpec.preset("reinforce"),
}


def main(capability: int, words: str) -> None:
    compiled: list[object] = []
    target = GPUTarget("cuda", capability, 32)
    driver.set_active(
        SimpleNamespace(  # type: ignore[arg-type]
            get_current_target=lambda: target, get_current_device=lambda: 0, get_current_stream=lambda device: 0
        )
    )  # fmt: skip
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: object, grid: object, warmup: bool, **kwargs: object) -> object:
        compiled.append(run(self, *args, grid=grid, warmup=True, **kwargs))
        return compiled[-1]

    JITFunction.run = compile_only  # type: ignore[method-assign]
    backend._interpreted = lambda: True  # type: ignore[assignment]  # takes CPU tensors
    for case, call in cases():
        if words not in case:
            continue
        call()
        for kernel in compiled:
            print(json.dumps({"case": case, "capability": capability, **resources(kernel)}), flush=True)
        compiled.clear()


def cases() -> Iterator[tuple[str, object]]:
    """Every kernel and flag of the launchers, in both dtypes, for widths that load whole vectors and one that does not."""
    targets = torch.zeros(N, dtype=torch.int64)
    one, scale = torch.ones(N), torch.full((N,), 0.5)
    guess = torch.full((N,), -1.0)
    tokens = Tokens(targets, torch.ones(N), None, None, guess, guess, guess)
    for dtype in (torch.bfloat16, torch.float32):
        for vocab in (151_936, 50_257):
            x = torch.empty(N, vocab, dtype=dtype)
            where = f"{str(dtype)[6:]} V={vocab}"
            for entropy in (True, False):
                for cap in (None, 30.0) if vocab == 151_936 else (None,):
                    detail = f"{where} entropy={entropy} cap={cap}"
                    b = one if entropy else None
                    yield (
                        f"forward {detail}",
                        lambda x=x, c=cap, e=entropy: backend.rows_forward(x, targets, scale, c, e),
                    )
                    yield (
                        f"backward {detail}",
                        lambda x=x, c=cap, b=b: backend.rows_backward_(x, targets, one, b, one, b, 1.0, c, one),
                    )
            for name, spec in LOSSES.items() if vocab == 151_936 else [("clip", LossSpec())]:
                for cap in (None, 30.0) if "KL" in name else (None,):
                    for processors in (1, 132):
                        detail = f"policy {where} {name} cap={cap} {'split' if processors > 1 else 'whole'}"

                        def call(x=x, spec=spec, cap=cap, processors=processors) -> None:
                            backend._processors = lambda device: processors
                            backend.rows_policy_loss_(x, targets, prepare(tokens, spec, torch.float32), spec, 1.0, cap)

                        yield detail, call


def resources(kernel: object) -> dict[str, object]:
    """From the machine code: registers and bytes of local memory (stack and spills) a thread, shared memory a program."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])  # type: ignore[attr-defined]
        cubin.flush()
        found = subprocess.run([tool, "-res-usage", cubin.name], capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.findall(rf"{key}:(\d+)", found)[-1]) for key in ("REG", "STACK", "LOCAL"))
    ptx = kernel.asm["ptx"]  # type: ignore[attr-defined]
    widest = max((int(n) for n in re.findall(r"(?:ld|st)\.global[.\w:]*\.v(\d)\.b32", ptx)), default=1)
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global [^;]*?, (0x\w+|\d+)", ptx)
    widest = max(widest, *(int(n, 0) // 4 for n in copies), 0)
    metadata = kernel.metadata  # type: ignore[attr-defined]
    return {
        "kernel": metadata.name, "registers": registers, "local_bytes": stack + local, "shared_bytes": metadata.shared,
        "warps": metadata.num_warps, "vector_words": widest,
    }  # fmt: skip


if __name__ == "__main__":
    main(int(sys.argv[1]), " ".join(sys.argv[2:]))
