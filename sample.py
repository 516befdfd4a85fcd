"""
Sample from a trained model, or from GPT-2.

    python sample.py --out_dir=out/completep_small --start='def main(' --temperature=0.8
    python sample.py --out_dir=out/completep_small --start=FILE:prompt.txt --num_samples=3
    python sample.py --init_from=gpt2 --start='The secret of good advice is'
"""
import codecs
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

import checkpoint
from configurator import UserError, configure, exit_on_user_error, first_line, require_at_least
from hardware import pick_device, pick_dtype
from model import GPT
from tokenizer import get_tokenizer, prompt_ids

GPT2_NAMES = ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl')


@dataclass
class SampleConfig:
    out_dir: str = 'out'           # folder of the run to sample from
    init_from: str = 'resume'      # resume (the newest checkpoint in out_dir), or gpt2, gpt2-medium, ..
    start: str = ''                # the prompt, or FILE:path; '' starts a new text
    num_samples: int = 1
    max_new_tokens: int = 500
    temperature: float = 0.8       # 0: always the likeliest token; 1: as the model predicts
    top_k: int = 200               # only the likeliest top_k tokens; 0: all
    seed: int = 1337
    device: str = 'auto'
    dtype: str = 'auto'

    def __post_init__(self):
        require_at_least(self, num_samples=1, max_new_tokens=1, temperature=0, top_k=0, seed=0)
        if self.init_from not in ('resume', *GPT2_NAMES):
            raise UserError(f"init_from='{self.init_from}' is not known: use resume, {', '.join(GPT2_NAMES)}")


def load_gpt2(name, **options):
    """GPT.from_pretrained with errors for users. Raises UserError."""
    try:
        return GPT.from_pretrained(name, **options)
    except ImportError:
        raise UserError(f"init_from='{name}' needs transformers: pip install transformers") from None
    except (OSError, ValueError) as error:
        raise UserError(f"init_from='{name}': {first_line(error)}") from None


def load(config):
    """(model, tokenizer) on the CPU. Raises UserError."""
    if config.init_from in GPT2_NAMES:
        return load_gpt2(config.init_from), get_tokenizer('gpt2')
    model, state = checkpoint.load_model(config.out_dir)
    return model, get_tokenizer(state['meta']['tokenizer'], state['meta'].get('chars'))


def print_sample(model, tokenizer, start, max_new_tokens, temperature=0.8, top_k=200, seed=1337, dtype=torch.float32):
    """Prints `start`, or nothing, and max_new_tokens tokens as they come. Raises UserError for unknown characters."""
    device = next(model.parameters()).device
    prompt = torch.tensor([prompt_ids(tokenizer, start)], device=device)
    generator = torch.Generator(device).manual_seed(seed)
    decoder = codecs.getincrementaldecoder('utf-8')(errors='replace')  # a character may span several tokens
    print(start, end='', flush=True)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        for token in model.stream(prompt, max_new_tokens, temperature, top_k, generator):
            print(decoder.decode(tokenizer.token_bytes(token.item())), end='', flush=True)
    print(decoder.decode(b'', final=True))


def main():
    c = SampleConfig(**configure(SampleConfig, sys.argv[1:]))
    start = c.start
    if start.startswith('FILE:'):
        try:
            start = Path(start[5:]).read_text(encoding='utf-8')
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"start='{start}' cannot be read: {error}") from None
    device = pick_device(c.device)
    dtype = pick_dtype(c.dtype, device)
    model, tokenizer = load(c)
    model.to(device).eval()
    for number in range(c.num_samples):
        if c.num_samples > 1:
            print(f'--- sample {number + 1}')
        print_sample(model, tokenizer, start, c.max_new_tokens, c.temperature, c.top_k, c.seed + number, dtype)


if __name__ == '__main__':
    exit_on_user_error(main)
