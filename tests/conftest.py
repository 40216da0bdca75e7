"""Shared by all areas: the command line as a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Cli = Callable[..., subprocess.CompletedProcess[str]]
PROGRAM = str(Path(sys.executable).with_name("omni-fast"))


@pytest.fixture(scope="session")
def cli() -> Cli:
    """Runs `omni-fast ARGUMENTS` to its end without a terminal; the result has returncode, stdout and stderr."""

    def run(*arguments: str, timeout: float = 280, **options: object) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "OMP_NUM_THREADS": "2", "COLUMNS": "200", "HF_HUB_OFFLINE": "1"}
        return subprocess.run(  # type: ignore[call-overload, no-any-return]
            [PROGRAM, *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            env=environment,
            check=False,
            **options,
        )

    return run
