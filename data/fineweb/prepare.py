"""
FineWeb's sample of 10 billion tokens (release v1.4.0), as GPT-2 tokens.

    python data/fineweb/prepare.py [--shards=N] [--input='FOLDER/*.parquet']    streams about 28 GB

Disk, computed: 40 GB while the shards are joined, then 20 GB. Memory: megabytes per worker. Time: not measured.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from nanop.errors import exit_on_user_error  # noqa: E402
from nanop.write_dataset import write_parquet  # noqa: E402

if __name__ == '__main__':
    repo, revision = 'HuggingFaceFW/fineweb', '9bb295ddab0e05d785b879661af7260fed5140fc'
    exit_on_user_error(lambda: write_parquet(Path(__file__).parent, repo, revision, 'sample/10BT/*.parquet'))
