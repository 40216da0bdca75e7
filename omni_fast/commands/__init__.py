"""The commands of `omni-fast`, a file for each group; `cli.py` puts them together. Shared here: options, and how they print.

What takes long to import is imported by the command that needs it, so that `--help` and `--dry-run` are instant.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

Source = Annotated[str, typer.Argument(help="TOML file or the name of a recipe.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Overrides, for example rollout.prompts_per_step=4")]
RunFolder = Annotated[Path | None, typer.Option("--run", help="Run folder; the same folder resumes.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the resolved config and the plan, start nothing.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]

console = Console(highlight=False)
stderr = Console(stderr=True, highlight=False)


def run_folder(given: Path | None, config: str) -> Path:
    """runs/NAME of the config where none is given; a shell leaves the ~ of --run=~/x alone."""
    source = Path(config)
    return (given or Path("runs") / (source.stem if source.is_file() else source.name)).expanduser()


def say(*lines: str, to: Console = console) -> None:
    """As they are: a path or an answer may look like markup."""
    for line in lines:
        to.print(Text(line), soft_wrap=True)
