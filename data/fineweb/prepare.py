"""
FineWeb's 10-billion-token sample in GPT-2's tokens (release v1.4.0).

    python data/fineweb/prepare.py [--shards N] [--input 'FOLDER/*.parquet']

Needs `pip install datasets` and a network, or local copies of the parquet files. Can be stopped and run again: finished
shards are kept. --shards takes only the first N files. Disk (computed from token counts, not measured): the download is about 28 GB, streamed and not kept; 40 GB while the shards are joined, 20 GB after.
Memory: a few pieces of text per worker, measured in LOG.md. Time: not measured.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import exit_on_user_error  # noqa: E402
from write_dataset import write_parquet  # noqa: E402

if __name__ == '__main__':
    exit_on_user_error(lambda: write_parquet(
        Path(__file__).parent, 'HuggingFaceFW/fineweb', '9bb295ddab0e05d785b879661af7260fed5140fc', 'sample/10BT/*.parquet'))
