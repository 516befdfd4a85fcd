"""
Tiny Shakespeare as GPT-2 tokens: 301,966 for training and 36,059 for validation, the last tenth, as in nanoGPT.

    python data/shakespeare/prepare.py [--input=FILE]    downloads 1.1 MB unless FILE is a copy of the text
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from nanop.errors import exit_on_user_error  # noqa: E402
from nanop.tokenizer import get_tokenizer  # noqa: E402
from nanop.write_dataset import write_shakespeare  # noqa: E402

if __name__ == '__main__':
    exit_on_user_error(lambda: write_shakespeare(Path(__file__).parent, lambda text: get_tokenizer('gpt2')))
