"""
SlimPajama, the corpus of the CompleteP paper, in GPT-2's tokens: the 10% sample that remains on the hub.

    python data/slimpajama/prepare.py [--shards N] [--input 'FOLDER/*.parquet']

Disk: 24 GB while the shards are joined, 12 GB after; the download, about 14 GB, is streamed and not kept (computed
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
    repo, revision = 'DKYoon/SlimPajama-6B', 'b5f90f419b7489cdba26fdbc8c022fcb5562f968'
    exit_on_user_error(lambda: write_parquet(Path(__file__).parent, repo, revision, 'data/train-*.parquet'))
