"""
SlimPajama, the corpus of the CompleteP paper, as GPT-2 tokens: the 10% sample that is still on the hub.

    python data/slimpajama/prepare.py [--shards=N] [--input='FOLDER/*.parquet']    streams about 14 GB

Disk, computed: 24 GB while the shards are joined, then 12 GB. Memory: megabytes per worker. Time: not measured.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from nanop.errors import exit_on_user_error  # noqa: E402
from nanop.write_dataset import write_parquet  # noqa: E402

if __name__ == '__main__':
    repo, revision = 'DKYoon/SlimPajama-6B', 'b5f90f419b7489cdba26fdbc8c022fcb5562f968'
    exit_on_user_error(lambda: write_parquet(Path(__file__).parent, repo, revision, 'data/train-*.parquet'))
