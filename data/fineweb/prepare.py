"""
FineWeb's 10-billion-token sample in GPT-2's tokens (release v1.4.0).

    python data/fineweb/prepare.py [--shards N] [--input 'FOLDER/*.parquet']

Disk: 40 GB while the shards are joined, 20 GB after; the download, about 28 GB, is streamed and not kept (computed
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
    repo, revision = 'HuggingFaceFW/fineweb', '9bb295ddab0e05d785b879661af7260fed5140fc'
    exit_on_user_error(lambda: write_parquet(Path(__file__).parent, repo, revision, 'sample/10BT/*.parquet'))
