"""SGLang servers: their own environment (`install`), and starting, watching and stopping them (`servers`).

The trainer never imports SGLang; it starts processes and talks HTTP to them. Nothing here imports torch.
"""

from __future__ import annotations

from omni_fast.serving.launch import KEY_VARIABLE, Launch
from omni_fast.serving.servers import Server, Status, down, kill, start, status, up, watched

__all__ = ["KEY_VARIABLE", "Launch", "Server", "Status", "down", "kill", "start", "status", "up", "watched"]
