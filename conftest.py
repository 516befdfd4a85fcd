"""Fixtures that several test files share."""
import numpy as np
import pytest

from dataset import ByteTokenizer
from write_dataset import write_dataset


@pytest.fixture(scope='session')
def data_dir(tmp_path_factory):
    """A learnable byte dataset: three words in random order."""
    words = np.random.default_rng(0).choice(['abc ', 'de ', 'fghij '], 12_000)
    folder = tmp_path_factory.mktemp('data')
    write_dataset(folder, [('train', ''.join(words[:10_000]), True), ('val', ''.join(words[10_000:]), True)],
                  ByteTokenizer(), 'words')
    return str(folder)
