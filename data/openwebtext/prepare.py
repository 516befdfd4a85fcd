"""
OpenWebText, nanoGPT's training set: 8,013,769 documents, about 9 billion GPT-2 tokens.

    python data/openwebtext/prepare.py [--shards=N] [--input='FOLDER/*.parquet']    streams about 24 GB

Disk, computed: 36 GB while the shards are joined, then 18 GB. Memory: megabytes per worker. Time: not measured.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from nanop.errors import exit_on_user_error  # noqa: E402
from nanop.write_dataset import write_parquet  # noqa: E402

if __name__ == '__main__':
    repo, revision = 'Skylion007/openwebtext', '79d93d786212f7344586290adb811d4ae6a1762c'
    exit_on_user_error(lambda: write_parquet(Path(__file__).parent, repo, revision, 'plain_text/train-*.parquet'))
