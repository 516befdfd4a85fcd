"""Fixtures that several test files share."""
import numpy as np
import pytest

from nanop.errors import UserError
from nanop.tokenizer import ByteTokenizer, get_tokenizer
from nanop.write_dataset import write_dataset
from train import TrainConfig


@pytest.fixture(scope='session')
def data_dir(tmp_path_factory):
    """A byte dataset that a model can learn: three words in random order."""
    words = np.random.default_rng(0).choice(['abc ', 'de ', 'fghij '], 12_000)
    folder = tmp_path_factory.mktemp('data')
    write_dataset(folder, [('train', ''.join(words[:10_000]), True), ('val', ''.join(words[10_000:]), True)],
                  ByteTokenizer(), 'words')
    return str(folder)


@pytest.fixture
def gpt2_tokenizer():
    try:
        return get_tokenizer('gpt2')
    except UserError:
        pytest.skip("needs GPT-2's tokens: a network or TIKTOKEN_CACHE_DIR")


@pytest.fixture
def tiny(tmp_path, data_dir):
    """A run of 8 steps that takes milliseconds and logs every step."""
    return TrainConfig(
        out_dir=str(tmp_path / 'out'), dataset=data_dir, block_size=16, batch_tokens=128, batch_size=4, max_iters=8,
        n_layer=2, n_embd=32, head_dim=16, base_n_layer=1, base_n_embd=16, base_head_dim=16, learning_rate=1e-2,
        eval_interval=4, eval_tokens=512, log_interval=1, compile=False, dtype='float32', device='cpu')
