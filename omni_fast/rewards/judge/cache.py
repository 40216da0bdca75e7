"""Verdicts on disk, so that a resumed run, a second process or a second epoch never pays for the same comparison twice.

SQLite in WAL mode: several processes may read and write at once. Only verdicts that were really given are kept.
A cache is a convenience: a damaged file is set aside and begun anew, a full disk stops the caching and not the run.
Limits: not for network file systems, where WAL does not work.
"""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from omni_fast.rewards.judge.pairwise import VERDICTS, Verdict


class VerdictCache:
    """`Question.key` -> verdict. Safe for several threads and processes. say: told when it begins anew or gives up."""

    def __init__(self, path: Path, say: Callable[[str], None] = lambda line: None) -> None:
        self.path, self.say = path, say
        self._lock = threading.RLock()
        self._connection: sqlite3.Connection | None = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                self._open()
            except sqlite3.OperationalError:  # locked, full, not writable: the verdicts in it are whole
                raise
            except sqlite3.DatabaseError as error:
                self.close()
                aside = path.replace(path.with_name(f"{path.name}.damaged"))
                for suffix in ("-wal", "-shm"):
                    path.with_name(path.name + suffix).unlink(missing_ok=True)
                self._open()
                say(f"the verdict cache {path} was damaged ({error}); it is kept as {aside.name} and begun anew")
        except (OSError, sqlite3.Error) as error:
            self._give_up(error)

    def _open(self) -> None:
        self._connection = database = sqlite3.connect(self.path, timeout=30.0, check_same_thread=False)
        database.execute("PRAGMA journal_mode=WAL")
        database.execute("PRAGMA synchronous=NORMAL")
        database.execute("CREATE TABLE IF NOT EXISTS verdicts (key TEXT PRIMARY KEY, verdict TEXT NOT NULL)")
        ((found,),) = database.execute("PRAGMA quick_check(1)")
        if found != "ok":
            raise sqlite3.DatabaseError(found)

    def _give_up(self, error: Exception) -> None:
        self.close()
        self.say(f"the verdict cache {self.path} cannot be used ({error}); verdicts are asked for again each time")

    def _run(self, statement: str, *rows: Sequence[str]) -> list[tuple[str, str]]:
        """What a statement gives, run for each row; nothing where the file cannot be used, which is told once."""
        with self._lock:
            if self._connection is not None:
                try:
                    with self._connection:
                        return [found for row in rows for found in self._connection.execute(statement, row)]
                except sqlite3.Error as error:
                    self._give_up(error)
            return []

    def get(self, keys: Iterable[str]) -> dict[str, Verdict]:
        """The known verdicts among the keys."""
        query = "SELECT key, verdict FROM verdicts WHERE key IN (SELECT value FROM json_each(?))"
        return {key: verdict for key, verdict in self._run(query, [json.dumps([*keys])]) if verdict in VERDICTS}

    def put(self, verdicts: Mapping[str, Verdict]) -> None:
        """Keep verdicts; one that is known already stays as it was, so every process agrees on the first."""
        if verdicts:
            self._run("INSERT OR IGNORE INTO verdicts VALUES (?, ?)", *verdicts.items())

    def close(self) -> None:
        with self._lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None
