"""Makes the fake SGLang server importable by the tests of the weight sync."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "rollout"))
