"""
OpenWebText in GPT-2's tokens: 8,013,769 documents, about 9 billion tokens, nanoGPT's training set.

    python data/openwebtext/prepare.py [--shards N] [--input 'FOLDER/*.parquet']

Disk: 36 GB while the shards are joined, 18 GB after; the download, about 24 GB, is streamed and not kept (computed
from the token count, not measured). Memory: a few pieces of text for each worker. Time: not measured.

Needs `pip install datasets` and a network, or local copies of the parquet files. It can be stopped and run again:
finished shards are kept. --shards takes only the first N files.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from nanop.errors import exit_on_user_error  # noqa: E402
from nanop.write_dataset import write_parquet  # noqa: E402

if __name__ == '__main__':
    repo, revision = 'Skylion007/openwebtext', '79d93d786212f7344586290adb811d4ae6a1762c'
    exit_on_user_error(lambda: write_parquet(Path(__file__).parent, repo, revision, 'plain_text/train-*.parquet'))
