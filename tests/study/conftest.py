"""Makes the helper modules importable by the tests beside them; the small model that studies train."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digit model with a short warm-up."""
    from omni_fast.study import tiny

    folder = tmp_path_factory.mktemp("model")
    tiny.save_model(folder, 0, steps=600)
    return folder
