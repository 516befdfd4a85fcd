"""
Write a trained model as a folder that Hugging Face transformers loads, with its tokenizer and a model card.

    python export_hf.py --out_dir=out/completep_small                     writes out/completep_small/hf
    python export_hf.py --out_dir=out/completep_small --target=llama --dtype=bfloat16 --overwrite=True

The folder computes what nanoP computes: a process of its own loads it with transformers and compares logits, loss and
tokens on the validation text. If they differ the folder does not get its name, and the exit code is 1.
"""
import json
import math
import os
import shlex
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from configurator import configure, flat
from model import GPT, GPTConfig, role_of
from nanop import checkpoint
from nanop.dataset import content_differs, open_dataset
from nanop.errors import UserError, exit_on_user_error, explained, import_optional, require, require_values
from nanop.files import lock, remove
from nanop.hf_check import LOGITS, mean_loss
from nanop.hf_tokenizer import write_tokenizer
from nanop.huggingface import OURS, TABLE, multipliers, to_hf, write_folder
from train import OUR_STARTS, TrainConfig

TOLERANCE = 1e-5  # on logits, relative to the largest, and on the loss, in float32
GREEDY = 32       # tokens
TEXT = 2**16      # validation tokens on which the tokenizers are compared


@dataclass
class ExportConfig:
    out_dir: str = 'out'           # folder of the run to export; the result is its subfolder hf
    overwrite: bool = False        # True: replace that subfolder
    target: str = 'auto'           # auto, or an architecture of transformers: docs/export.md
    dtype: str = 'float32'         # of the weights: float32, bfloat16 (it says how much the loss changes)
    average: int = 1               # number of newest checkpoints whose weights to average (train.py's keep_checkpoints)
    tokenizer: bool = True         # False: leave it out
    dataset: str = ''              # whose validation text is compared; '': the run's
    eval_tokens: int = 0           # validation tokens of the comparison; 0: as many as in the run

    def __post_init__(self):
        require_values(self, at_least=dict(average=1, eval_tokens=0), choices=dict(
            target=('auto', *TABLE), dtype=('float32', 'bfloat16')))
        require(self, 'out_dir', bool(self.out_dir), 'give the folder of a run')


# -----------------------------------------------------------------------------
# What nanoP computes
def val_sequences(data, num_tokens, block_size):
    """The validation sequences (N, T + 1) of train.py."""
    starts = data.val_starts(num_tokens, block_size)
    inputs, targets = data.batch('val', starts, block_size, torch.device('cpu'))
    return torch.cat((inputs, targets[:, -1:]), dim=1)


def real_ids(gpt):
    return gpt.real_vocab_size or gpt.vocab_size


def losses(model, sequences):
    """(loss as train.py prints it, loss among the real ids alone, of which padding takes no probability)"""
    vocab_size, real = model.config.vocab_size, real_ids(model.config)
    loss = mean_loss(lambda ids: model(ids)[0], sequences)
    return loss, loss if real == vocab_size else mean_loss(lambda ids: model(ids)[0][..., :real], sequences)


@torch.no_grad()
def expected(model, sequences):
    """The tensors that nanop/hf_check.py compares with."""
    c, real = model.config, real_ids(model.config)
    new = min(GREEDY, c.block_size // 2)
    shown = sequences[:max(1, LOGITS // (c.block_size * real)), :-1][:4]
    prompt = sequences[:1, :c.block_size - new].clone()
    return dict(sequences=sequences, logits=model(shown)[0][..., :real].contiguous(), prompt=prompt,
                greedy=model.generate(prompt, new, temperature=0)[0, prompt.size(1):].contiguous())


# -----------------------------------------------------------------------------
# What transformers computes
def ask_transformers(folder, path, dtype):
    """The findings of nanop/hf_check.py, from a process of its own; UserError if it fails."""
    done = subprocess.run([sys.executable, '-m', 'nanop.hf_check', str(folder.resolve()), str(path), dtype],
                          cwd=Path(__file__).parent, capture_output=True, text=True, check=False,
                          env=os.environ | dict(HF_HUB_OFFLINE='1', TRANSFORMERS_VERBOSITY='error'))
    if done.returncode:
        raise UserError(f"transformers cannot load '{folder}': "
                        f"{next(iter(done.stderr.strip().splitlines()[::-1]), f'exit code {done.returncode}')}")
    return json.loads(done.stdout.splitlines()[-1])


def problems(found, loss):
    """What is wrong with these findings, a list of texts; `loss` is nanoP's."""
    if found['loaded']:
        return [f'transformers did not load it as it is: {found["loaded"]}']
    if 'loss' not in found:
        return [f"its vocabulary has {found['vocab_size']} ids, not nanoP's"]
    wrong = []
    if not found['difference'] <= TOLERANCE:
        wrong.append(f"its logits differ by {found['difference']:.2g} of the largest, more than {TOLERANCE:g}")
    if not abs(found['loss'] - loss) <= TOLERANCE * loss:
        wrong.append(f"its validation loss is {found['loss']:.6f}, nanoP's {loss:.6f}")
    if not found['greedy_gap'] <= 2 * TOLERANCE:  # less is a tie between two tokens, which rounding decides
        wrong.append(f"its greedy tokens are others, by {found['greedy_gap']:.2g} of the largest logit")
    return wrong


def figures_of(c, gpt, data, model, sequences, found, loss_with_padding, loss, steps):
    """(what, value) rows on the model as it is exported."""
    bits = loss / math.log(2) / data.bytes_per_token
    rows = [('parameters', f'{model.num_params():,}'),
            ('weights', f'the average of steps {steps[::-1]}' if len(steps) > 1 else f'step {steps[0]}'),
            ('validation loss', f"{found['loss']:.4f} nats per token with transformers, {loss:.4f} with nanoP, "
                                f'{bits:.4f} bits per byte, over {sequences[:, 1:].numel():,} tokens')]
    if loss_with_padding != loss:
        rows.append(('validation loss as train.py prints it', f'{loss_with_padding:.4f}; it counts the probability of '
                     f'the {gpt.vocab_size - real_ids(gpt)} ids of padding, which are cut here'))
    return [*rows, ('checked in float32', f"logits differ by at most {found['difference']:.2g} of the largest, "
                                          f'{min(GREEDY, gpt.block_size // 2)} greedy tokens are equal')]


# -----------------------------------------------------------------------------
# The model card
def command(config, meta):
    """The command that trains with these keys; of paths, which are the user's own, the last name."""
    ignored = {'out_dir', 'overwrite', 'new_data', 'eval_only', 'decay_steps', 'wandb_project', 'wandb_run_name'}
    if config['init_from'] in OUR_STARTS or config['decay_steps']:  # a branch is a run of its length
        ignored.add('init_from')
    names = {key: Path(config[key]).name for key in ('dataset', 'init_from')}
    config, usual = flat(config | names), asdict(TrainConfig())
    ignored |= {key for key in ('vocab_size', 'real_vocab_size') if config[key] == meta[key]}
    flags = [f'--{key}={value}' for key, value in config.items()
             if key not in ignored and key.partition('.')[0] in usual and value != usual.get(key, 1.0)]
    return shlex.join(['python', 'train.py', *flags])


def card(c, run, gpt, target, folded, figures):
    """The text of README.md: what the model is, how it was trained, how it was changed. `run`: its config, meta and
    progress; `figures`: (what, value) rows on the model as it was exported."""
    config, meta = asdict(TrainConfig()) | run['config'], run['meta']  # runs of earlier versions lack keys
    base = ('n_layer', 'n_embd', 'head_dim', *(['n_kv_head'] if gpt.n_kv_head else []))
    values = {key: config[key] for key in (
        'learning_rate', 'weight_decay', 'weight_decay_mode', 'tau_ema', 'eps', 'beta1', 'beta2', 'init_std',
        'input_mult', 'attn_mult', 'output_mult', 'batch_tokens', 'base_batch_tokens', 'base_train_tokens',
        'init_std_mult', 'lr_mult', 'weight_decay_mult', 'eps_mult')}
    rows = [('architecture', f'{target}; in nanoP {gpt.n_layer} layers x {gpt.n_embd}, head_dim {gpt.head_dim}, '
                             f'context {gpt.block_size} tokens'), *figures,
            ('training tokens', f"{run['tokens']:,} in {run['step']:,} steps"),
            ('data', f"{meta.get('source') or Path(config['dataset']).name}; sha256 of its ids "
                     f"{meta.get('data_sha256', 'not known')}"),
            ('tokenizer', f"{meta['tokenizer']}{'' if c.tokenizer else ', left out of this folder'}"),
            ('parameterization', f"{gpt.parameterization}{f', alpha {gpt.alpha:g}' if gpt.alpha else ''}"),
            ('base shape', ', '.join(f"{key} {getattr(gpt, f'base_{key}') or getattr(gpt, key)}" for key in base)),
            ('optimizer', config['optimizer'])]
    held = (
        'Nothing was folded: every multiplier is a key of config.json, or does nothing, and every weight is as it was '
        'trained.') if not folded else (
        'These multipliers were folded into the weights:\n\n' + '\n'.join(f'- {text}' for text in folded) + '\n\n'
        'The function is the same, but the folded weights have left their parameterization: one learning rate for all '
        'of them, as in finetuning with transformers, is not what the rules transfer. To train on under the rules, '
        f'give this folder to train.py as --init_from, which undoes the fold with the help of {OURS}.')
    own = ', trust_remote_code=True' if target == TABLE['nanop'].architecture else ''
    with torch.device('meta'):
        roles = {role_of(name) for name, _ in GPT(gpt).weights()}
    factors = '\n'.join(f'| {role} | ' + ' | '.join('-' if value is None else f'{value:g}' for value in rule[:5]) + ' |'
                        for role, rule in gpt.rules.items() if role in roles or rule.lr is None)
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [nanoP, {gpt.parameterization}]
---
# {Path(c.out_dir).resolve().name}

A GPT trained with nanoP: its hyperparameters are those of a small base shape, multiplied by the rules below.

| | |
|---|---|
{chr(10).join(f'| {key} | {value} |' for key, value in rows)}

## Training

```
{command(config, meta)}
```

Base hyperparameters: {', '.join(f'{key} {value}' for key, value in flat(values).items())}.

The rules multiply these values, for each role of a tensor, by

| role | init std | learning rate | weight decay | eps | forward |
|---|---|---|---|---|---|
{factors}

## This folder

{held}

## Use

```python
from transformers import pipeline
print(pipeline('text-generation', model='hf'{own})('Once', max_new_tokens=50)[0]['generated_text'])
```

{'The tokenizer reads and writes as in training: text that looks like a special token is plain text.' if c.tokenizer
 else 'The folder has no tokenizer.'}
"""


# -----------------------------------------------------------------------------
# The export
def load(c):
    """(GPTConfig, newest weights, their state, data) of a run."""
    weights, state = checkpoint.load_weights(c.out_dir)
    data = open_dataset(c.dataset or state['config']['dataset'])
    other = content_differs(state['meta'], data.meta)
    tokenizer = [(meta['tokenizer'], meta.get('chars')) for meta in (state['meta'], data.meta)]
    if tokenizer[0] != tokenizer[1]:
        raise UserError(f"dataset='{c.dataset}' has another tokenizer than the run, so its ids mean other text: use "
                        "the run's dataset, or another with its tokenizer")
    if other:
        print(f"compared on other data than the run's: its {'; its '.join(other)}")
    return GPTConfig(**state['model_config']), weights, state, data


def averaged(c, gpt, weights, state, sequences):
    """(weights, steps) to export. Where they are an average, the loss of the newest weights and its own are printed."""
    if c.average == 1:
        return weights, [state['step']]
    mean, steps = checkpoint.average_weights(c.out_dir, c.average)
    if steps[0] != state['step']:
        raise UserError(f'a checkpoint of step {steps[0]} has been written meanwhile: run the export again')
    for what, tensors in ((f'step {steps[0]} alone', weights), (f'average of steps {steps[::-1]}', mean)):
        loss = losses(GPT.from_weights(gpt, tensors).eval(), sequences)[0]
        print(f'{what}: validation loss {loss:.4f}')
    return mean, steps


def write(folder, c, gpt, state, data, hf_config, tensors):
    """Write all but the model card, the weights in float32."""
    with explained(OSError, f"'{folder}' could not be written"):
        remove(folder)
        folder.mkdir()
        if c.tokenizer:
            tokenizer, ids = data.tokenizer(), data.read_ids('val', 0, min(TEXT, data.num_tokens['val']))
            text = b''.join(map(tokenizer.token_bytes, ids.tolist())).decode(errors='replace')
            hf_config.update(write_tokenizer(folder, state['meta'], gpt.block_size, [text]))
        write_folder(folder, hf_config, tensors)
        ours = dict(model_config=asdict(gpt), target=hf_config['model_type'], meta=state['meta'], step=state['step'])
        (folder / OURS).write_text(json.dumps(ours, indent=1) + '\n')


def export(c, final):
    """Write the folder `final`, unless transformers computes something else. Returns the exit code."""
    gpt, weights, state, data = load(c)
    sequences = val_sequences(data, c.eval_tokens or state['config']['eval_tokens'], gpt.block_size)
    weights, steps = averaged(c, gpt, weights, state, sequences)
    model = GPT.from_weights(gpt, weights).eval()
    target, hf_config, tensors, folded = to_hf(asdict(gpt), multipliers(model), weights, c.target)
    print(f"{hf_config['architectures'][0]}: {'; '.join(folded) or 'every multiplier kept, nothing folded'}")
    folder = final.with_suffix('.tmp')
    write(folder, c, gpt, state, data, hf_config, tensors)
    loss_with_padding, loss = losses(model, sequences)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, 'expected.safetensors')
        with explained(Exception, f"'{path}' could not be written", 'make room'):  # safetensors has its own kind
            save_file(expected(model, sequences), path)
        found = ask_transformers(folder, path, 'float32')
        wrong = problems(found, loss)
        if wrong:
            print(f"error: '{folder}' is not this model: {'; '.join(wrong)}. It is left there to look at; nothing else "
                  'was changed', file=sys.stderr)
            return 1
        figures = figures_of(c, gpt, data, model, sequences, found, loss_with_padding, loss, steps)
        if c.dtype != 'float32':
            write_folder(folder, hf_config, tensors, c.dtype)
            rounded = ask_transformers(folder, path, 'auto')
            figures.append((f'in {c.dtype}', f"loss {rounded['loss']:.4f}, changed by {rounded['loss'] - loss:+.2g}; "
                            f"logits differ by up to {rounded['difference']:.2g} of the largest"))
    print('\n'.join(f'{what}: {value}' for what, value in figures))
    text = card(c, state, gpt, hf_config['architectures'][0], folded, figures)
    with explained(OSError, f"'{final}' could not be written"):
        (folder / 'README.md').write_text(text)
        remove(final)
        os.rename(folder, final)
    print(f'written: {final}')
    return 0


def main():
    """Returns the exit code: 1 if transformers computes something else."""
    c = ExportConfig(**configure(ExportConfig, sys.argv[1:]))
    import_optional('transformers', 'export_hf.py')
    final = Path(c.out_dir, 'hf')
    if final.exists() and not c.overwrite:
        raise UserError(f"'{final}' exists: move it, or use --overwrite=True to lose it")
    if not checkpoint.find(c.out_dir):
        checkpoint.newest(c.out_dir)  # raises UserError, before the lock would make a folder
    held = lock(c.out_dir, '.lock_export', 'exporting from')  # training may go on meanwhile
    try:
        return export(c, final)
    finally:
        held.release()


if __name__ == '__main__':
    exit_on_user_error(main, goes_on=False)
