"""Reading rows from JSON lines and parquet, with the line number in every complaint."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import cast

from omni_fast.errors import UserError
from omni_fast.tasks.base import Json

Row = Mapping[str, Json]
_SHOWN = 80  # characters of a bad line in a message


def read_rows(path: str) -> list[tuple[int, Row]]:
    """(line number from 1, row) of a .jsonl or .parquet file. Raises UserError; blank lines are skipped."""
    file = Path(path)
    if not file.is_file():
        raise UserError(f"no data file '{path}'; give a path relative to where the command runs, or an absolute one")
    try:
        rows = list(_parquet(file) if file.suffix == ".parquet" else _lines(file))
    except OSError as error:
        raise UserError(f"'{path}' cannot be read ({error.strerror or error}); check its permissions") from error
    if not rows:
        raise UserError(f"'{path}' holds no rows; a data set needs some")
    return rows


def _lines(file: Path) -> Iterator[tuple[int, Row]]:
    for number, line in enumerate(file.read_bytes().split(b"\n"), start=1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            row = json.loads(text) if text else {}
        except (ValueError, RecursionError) as error:
            shown = line[:_SHOWN].decode("utf-8", "replace")
            told = f"{file}, line {number} is not JSON ({error}): {shown!r}"
            raise UserError(f"{told}; every line must be one JSON object") from error
        if not isinstance(row, dict):
            raise UserError(f"{file}, line {number} is a {type(row).__name__}, not a JSON object with columns")
        if text:
            yield number, row


def _parquet(file: Path) -> Iterator[tuple[int, Row]]:
    import pyarrow  # slow to import
    import pyarrow.parquet as parquet

    try:
        table = parquet.read_table(file)
    except pyarrow.ArrowException as error:
        raise UserError(f"'{file}' is not a readable parquet file ({error}); write it again") from error
    yield from enumerate(cast(list[Row], table.to_pylist()), start=1)
