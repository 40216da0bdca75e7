"""Makes the fake SGLang server and what these tests share importable."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1] / "rollout"), str(Path(__file__).parent)]
