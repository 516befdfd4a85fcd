"""
Sample from a trained model, from GPT-2 or from a folder of Hugging Face.

    python sample.py --out_dir=out/completep_small --start='def main(' --temperature=0.8
    python sample.py --out_dir=out/completep_small --start=FILE:prompt.txt --num_samples=3
    python sample.py --init_from=gpt2 --start='The secret of good advice is'
"""
import sys
from dataclasses import dataclass
from pathlib import Path

from configurator import configure
from model import GPT, GPTConfig
from nanop import checkpoint
from nanop.errors import UserError, exit_on_user_error, explained, require_values
from nanop.hf_tokenizer import FolderTokenizer
from nanop.huggingface import from_hf, require_start
from nanop.machine import set_up
from nanop.sampling import print_sample
from nanop.tokenizer import get_tokenizer


@dataclass
class SampleConfig:
    out_dir: str = 'out'           # folder of the run to sample from
    init_from: str = 'resume'      # resume (the newest checkpoint in out_dir), gpt2, gpt2-medium, .., or a
    #                                folder of Hugging Face, such as export_hf.py writes
    start: str = ''                # the prompt, or FILE:path; '' starts a new text
    num_samples: int = 1
    max_new_tokens: int = 500
    temperature: float = 0.8       # 0: always the likeliest token; 1: as the model predicts
    top_k: int = 200               # sample from the likeliest top_k tokens only; 0: from all
    seed: int = 1337
    device: str = 'auto'
    dtype: str = 'auto'

    def __post_init__(self):
        require_values(self, at_least=dict(num_samples=1, max_new_tokens=1, temperature=0, top_k=0, seed=0))
        require_start(self, ['resume'])


def load(config):
    """(model, tokenizer) on the CPU."""
    if config.init_from != 'resume':
        model, meta = from_hf(config.init_from, GPT, GPTConfig(parameterization='sp'))  # whose factors are all 1
        tokenizer = get_tokenizer(meta['tokenizer'], meta.get('chars')) if meta else FolderTokenizer(config.init_from)
        if tokenizer.vocab_size > model.config.vocab_size:
            raise UserError(f"the tokenizer of '{config.init_from}' has {tokenizer.vocab_size} ids, its model only "
                            f'{model.config.vocab_size}: use a folder in which they belong together')
        return model, tokenizer
    weights, state = checkpoint.load_weights(config.out_dir)
    model = GPT.from_weights(GPTConfig(**state['model_config']), weights)
    return model, get_tokenizer(state['meta']['tokenizer'], state['meta'].get('chars'))


def main():
    c = SampleConfig(**configure(SampleConfig, sys.argv[1:]))
    start = c.start
    if start.startswith('FILE:'):
        with explained((OSError, UnicodeDecodeError), f"start='{start}' cannot be read"):
            start = Path(start[5:]).read_text(encoding='utf-8')
    machine = set_up(c.device, c.dtype)
    model, tokenizer = load(c)
    model.to(machine.device).eval()
    for number in range(c.num_samples):
        if c.num_samples > 1:
            print(f'--- sample {number + 1}')
        with machine.autocast():
            print_sample(model, tokenizer, start, c.max_new_tokens, c.temperature, c.top_k, c.seed + number)


if __name__ == '__main__':
    exit_on_user_error(main, goes_on=False)
