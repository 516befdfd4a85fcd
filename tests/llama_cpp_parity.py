"""
Runs exported models in llama.cpp and compares its logits with nanoP's.

    python tests/llama_cpp_parity.py --checkout=../llama.cpp

`checkout` is a source tree of llama.cpp: its converter is used. The package llama-cpp-python runs the result on a CPU,
everything in float32. The models are small, with odd multipliers, random gains and biases, and GPT-2's tokenizer. Every
finished model appends a row to table.csv in out_dir, and models that have a row are skipped.

In results/export_llama_cpp, gelu_in_float32 is from a llama.cpp that was compiled without GGML_GELU_FP16, and
transformers_4 is gpt_neox with transformers 4.57.6 under the converter.
"""
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from configurator import configure  # noqa: E402
from nanop.errors import exit_on_user_error, require  # noqa: E402
from nanop.files import append_csv, make_out_dir, read_csv  # noqa: E402
from nanop.hf_tokenizer import ODD_TEXTS, write_tokenizer  # noqa: E402
from nanop.huggingface import TABLE, misfits, multipliers, to_hf, write_folder  # noqa: E402
from nanop.tokenizer import get_tokenizer  # noqa: E402


@dataclass
class ParityConfig:
    checkout: str = ''                         # a source tree of llama.cpp
    out_dir: str = 'results/export_llama_cpp'  # of table.csv
    activation: str = ''                       # only the models with this activation; '': all


TOKENS, GREEDY = 48, 16
SHAPE = dict(block_size=64, n_layer=5, n_embd=128, head_dim=32, base_n_embd=48, base_head_dim=16, init_std=0.1,
             vocab_size=50304, real_vocab_size=50257)
VARIANTS = (dict(), dict(tie_weights=True), dict(bias=False), dict(bias=True), dict(qk_norm=False), dict(qk_norm=True),
            dict(activation='gelu'), dict(activation='relu'), dict(activation='relu2'))


def models():
    """(target, tokenizer, GPTConfig) of every model."""
    from test_export import CHANGES, ODD  # needs transformers, test_docs.py does not
    runs = dict(arcee=dict(bias=False), smollm3=dict(bias=False), stablelm=dict(qk_norm=False))  # what llama.cpp loads
    for target, row in TABLE.items():
        first = replace(ODD, **SHAPE | CHANGES[target] | runs.get(target, {}))
        configs = [replace(first, **changes) for changes in VARIANTS]
        for i, c in enumerate(configs):
            if c not in configs[:i] and not misfits(row, asdict(c)):
                yield target, 'gpt2', c
    yield 'granite', 'byte', replace(ODD, **SHAPE | CHANGES['granite'] | dict(vocab_size=256, real_vocab_size=256))


def name_of(c):
    return ', '.join([c.activation, 'tied' if c.tie_weights else 'untied', 'biases' if c.bias else 'no biases',
                      *(['qk_norm'] if c.qk_norm else [])])


IN_LLAMA_CPP = '''
import json, sys
import llama_cpp, numpy
gguf, given, result = sys.argv[1:]
ids, greedy, texts = json.load(open(given))
llm = llama_cpp.Llama(gguf, n_ctx=len(ids) + greedy, logits_all=True, n_threads=1, flash_attn=False,
                      type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32)  # the default is float16
llm.eval(ids)
for _ in range(greedy):
    llm.eval([int(llm.scores[llm.n_tokens - 1].argmax())])
words = [' '.join(map(str, llm.tokenize(text.encode(), add_bos=False))) for text in texts]
numpy.savez(result, logits=llm.scores[:len(ids)], greedy=llm.input_ids[len(ids):len(ids) + greedy], words=words)
'''


def command(*words):
    """(did it succeed, what it said)"""
    done = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, errors='replace',
                          check=False)
    return done.returncode == 0, done.stderr


def reason(said):
    """The line of an output that says why it failed, without paths."""
    lines = said.strip().splitlines() or ['no output']
    found = [line for line in lines if 'error loading model:' in line] or [
        line for line in lines if 'Error' in line or 'ERROR' in line] or lines
    return re.sub(r'/\S*/', '', found[-1].strip().rpartition('error loading model: ')[2])


def compare(model, ids, found):
    """The columns of a model that runs."""
    real = model.config.real_vocab_size
    ids = torch.tensor([ids])
    with torch.no_grad():
        ours = model(ids)[0][0, :, :real].numpy()
    greedy = model.generate(ids, GREEDY, temperature=0)[0, TOKENS:].tolist()
    difference = np.abs(ours - found['logits']).max() / np.abs(ours).max()
    words = [' '.join(map(str, get_tokenizer('gpt2').encode(text))) for text in ODD_TEXTS]
    return dict(difference=f'{difference:.1e}', greedy_equal=greedy == found['greedy'].tolist(),
                tokens_equal=words == found['words'].tolist())


def row_of(target, tokenizer, config, checkout, folder):
    """The row of table.csv for one model."""
    from test_export import trained
    model = trained(config)
    _, hf_config, tensors, _ = to_hf(asdict(config), multipliers(model), model.state_dict(), target)
    write_folder(folder, hf_config | write_tokenizer(folder, dict(tokenizer=tokenizer), config.block_size), tensors)
    gguf, given, result = folder / 'model.gguf', folder / 'given.json', folder / 'result.npz'
    ids = np.random.default_rng(0).integers(config.real_vocab_size, size=TOKENS).tolist()
    given.write_text(json.dumps([ids, GREEDY, ODD_TEXTS]))
    row = dict(target=target, model=name_of(config), tokenizer=tokenizer, converts=False, loads=False, difference='',
               greedy_equal='', tokens_equal='', note='')
    row['converts'], said = command(checkout / 'convert_hf_to_gguf.py', folder, '--outtype', 'f32', '--outfile', gguf)
    if row['converts']:
        row['loads'], said = command('-c', IN_LLAMA_CPP, gguf, given, result)
    return row | (compare(model, ids, np.load(result)) if row['loads'] else dict(note=reason(said)))


def main():
    config = ParityConfig(**configure(ParityConfig, sys.argv[1:]))
    require(config, 'checkout', Path(config.checkout, 'convert_hf_to_gguf.py').is_file(),
            'give a source tree of llama.cpp')
    path = make_out_dir(config.out_dir) / 'table.csv'
    for target, tokenizer, model in models():
        done = any(row['target'] == target and (
            (row['model'], row['tokenizer']) == (name_of(model), tokenizer) or 'is not supported' in row['note'])
            for row in read_csv(path))  # of an architecture that the converter does not know one model is enough
        if not done and config.activation in ('', model.activation):
            with tempfile.TemporaryDirectory() as folder:
                row = row_of(target, tokenizer, model, Path(config.checkout), Path(folder))
            append_csv(path, [row])
            print(row, flush=True)


if __name__ == '__main__':
    exit_on_user_error(main)
