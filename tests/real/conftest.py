"""The real SGLang servers of a test run, each started once, and the model that they serve.

The environment is installed when it is missing (about 2 minutes); where that fails the tests are skipped with the reason,
or fail when OMNI_FAST_ENGINE_REQUIRED is set.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from omni_fast import serving
from omni_fast.errors import RunError, UserError
from omni_fast.serving import install
from omni_fast.serving.launch import adapter_flags

sys.path.insert(0, str(Path(__file__).parent))
from served_sglang import TEMPLATE, TEXT, disk_update, tiny_llama


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        [*TEXT, " A B" * 9],  # the judge's labels are tokens
        trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>", pad_token="<|pad|>")
    tokenizer.chat_template = TEMPLATE
    folder = tmp_path_factory.mktemp("model")
    tokenizer.save_pretrained(folder)
    tiny_llama(0).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def environment() -> None:
    try:
        install.install("cpu", print)
    except (RunError, UserError) as error:
        reason = f"SGLang's environment cannot be built here: {error}"
        pytest.fail(reason) if os.environ.get("OMNI_FAST_ENGINE_REQUIRED") else pytest.skip(reason)


@pytest.fixture(scope="session")
def engine_folder(environment: None, model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of the one server that most tests share."""
    folder = tmp_path_factory.mktemp("servers")
    launch = serving.Launch("policy-0", str(model_folder), dtype="float32", flags=("--log-level", "warning"))
    try:
        serving.start([launch], folder, say=print)
        yield folder
    finally:
        serving.down(folder)


@pytest.fixture(scope="session")
def adapter_folder(environment: None, model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of another server, which takes LoRA adapters."""
    folder = tmp_path_factory.mktemp("adapter-servers")
    flags = (*adapter_flags(8, "cpu"), "--log-level", "warning")
    launch = serving.Launch("policy-0", str(model_folder), dtype="float32", flags=flags)
    try:
        serving.start([launch], folder, say=print)
        yield folder
    finally:
        serving.down(folder)


@pytest.fixture(scope="session")
def adapter_url(adapter_folder: Path) -> str:
    return serving.status(adapter_folder)[0].server.url


@pytest.fixture(scope="session")
def url(engine_folder: Path) -> str:
    return serving.status(engine_folder)[0].server.url


@pytest.fixture
def original(url: str, model_folder: Path) -> Iterator[None]:
    """Puts the first weights back after a test that changes them."""
    yield
    disk_update(url, model_folder, "default")
