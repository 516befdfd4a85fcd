"""Tests of export_hf.py: the tokenizers, the average, the check in a fresh process, the model card, lm_eval."""
import json
import math
import random
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import export_hf
from model import GPT, GPTConfig
from nanop import checkpoint, hf_check, hf_tokenizer
from nanop.errors import UserError
from nanop.files import checksum
from nanop.hf_tokenizer import ODD_TEXTS, require_same, write_tokenizer
from nanop.tokenizer import CharTokenizer, get_tokenizer
from train import read_config, train

transformers = pytest.importorskip('transformers', reason='needs transformers (requirements-dev.txt)')


@pytest.fixture
def run(tiny):
    """A folder of a run with three checkpoints, of multipliers that are no powers of two and masks."""
    config = dict(n_layer=3, n_embd=48, input_mult=1.7, output_mult=0.6, density=0.5, eval_interval=2,
                  keep_checkpoints=3, activation='relu')
    for key, value in config.items():
        setattr(tiny, key, value)
    train(tiny)
    return tiny.out_dir


def export(monkeypatch, *flags):
    monkeypatch.setattr(sys, 'argv', ['export_hf.py', *flags])
    return export_hf.main()


# -----------------------------------------------------------------------------
# Tokenizers
ODD_CHARS = CharTokenizer.of(''.join(ODD_TEXTS)).chars


def written(folder, name, chars=None):
    return write_tokenizer(folder, dict(tokenizer=name, chars=chars), 64), \
        transformers.AutoTokenizer.from_pretrained(folder)


def test_bytes_are_the_same(tmp_path):
    special, hf = written(tmp_path, 'byte')
    assert special == dict(bos_token_id=10, eos_token_id=None, pad_token_id=None) and len(hf) == 256
    assert hf.get_vocab()[hf.convert_ids_to_tokens(65)] == 65 and hf.model_max_length == 64
    for seed in range(300):  # also bytes that are no UTF-8
        ids = list(random.Random(seed).randbytes(40))
        assert hf.decode(ids) == bytes(ids).decode(errors='replace')
    text = ''.join(map(chr, [*range(0xd800), *range(0xe000, 0x3000)]))
    assert hf.encode(text) == list(text.encode())


def test_characters_are_the_same_and_others_refused(tmp_path):
    special, hf = written(tmp_path, 'char', ODD_CHARS)
    assert special['bos_token_id'] == ODD_CHARS.index('\n') and len(hf) == len(ODD_CHARS)
    assert hf.encode('\r\n  e\u0301<|endoftext|>') == [ODD_CHARS.index(char) for char in '\r\n  e\u0301<|endoftext|>']
    with pytest.raises(Exception, match='Missing'):  # nanoP refuses it, too; an unknown character must not be dropped
        hf.encode('a\u4e01')


def test_gpt2_is_the_same(tmp_path, gpt2_tokenizer):
    special, hf = written(tmp_path, 'gpt2')
    assert special == dict(bos_token_id=50256, eos_token_id=50256, pad_token_id=None)
    assert hf.eos_token_id == 50256 and len(hf) == 50257
    assert hf.encode('<|endoftext|>') == gpt2_tokenizer.encode('<|endoftext|>').tolist() != [50256]
    letters = random.Random(0)
    pieces = [*'aA1é中🙂,/_½ \n\t', '\u0301', '\xa0', '\u0085', '\r\n', '  ', "'s", "'S", '12', '<|endoftext|>']
    for _ in range(2000):
        text = ''.join(letters.choices(pieces, k=12))
        assert hf.encode(text) == gpt2_tokenizer.encode(text).tolist()


def test_a_pattern_of_tiktoken_keeps_its_meaning():
    """'{1,3}+' repeats and '$' ends a line in the regular expressions of Hugging Face."""
    tokenizers = pytest.importorskip('tokenizers')
    made = hf_tokenizer.byte_level(tokenizers, {}, [], r'\p{N}{1,3}+|\s++$|\s+(?!\S)|\s|\w')
    pieces = [piece for piece, _ in made.pre_tokenizer.pre_tokenize_str('1234567a \nb  ')]
    assert pieces == ['123', '456', '7', 'a', 'Ġ', 'Ċ', 'b', 'ĠĠ']


@pytest.mark.parametrize('fault', ['normalized', 'a leading space', 'no decoder', 'a special token'])
def test_a_tokenizer_that_differs_is_refused(fault, monkeypatch, tmp_path):
    tokenizers = pytest.importorskip('tokenizers')
    ours = get_tokenizer('byte')
    made = hf_tokenizer.make(ours)
    require_same(made, ours, ODD_TEXTS)
    inner = made._tokenizer
    if fault == 'normalized':
        inner.normalizer = tokenizers.normalizers.NFC()
    elif fault == 'a leading space':
        inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False)
    elif fault == 'no decoder':
        inner.decoder = tokenizers.decoders.Fuse()
    else:
        made.split_special_tokens = False
        made.add_special_tokens(dict(eos_token='<|endoftext|>'))
    monkeypatch.setattr(hf_tokenizer, 'make', lambda ours: made)
    with pytest.raises(UserError, match="cannot hold tokenizer='byte', it (reads|writes) .* --tokenizer=False"):
        write_tokenizer(tmp_path, dict(tokenizer='byte'), 64)


def test_half_a_character_is_refused(tmp_path):
    with pytest.raises(UserError, match='leave it out with --tokenizer=False'):
        written(tmp_path, 'char', 'ab\ud800')


# -----------------------------------------------------------------------------
# The average
def test_the_last_checkpoints_are_averaged(run, capsys):
    paths = checkpoint.find(run)
    assert [checkpoint.step_of(path) for path in paths] == [8, 6, 4]
    mean, steps = checkpoint.average_weights(run, 2)
    held = [checkpoint.read_weights(path) for path in paths]
    assert steps == [8, 6]
    for name, value in mean.items():
        if name.endswith('mask'):
            assert torch.equal(value, held[0][name])
        else:
            assert torch.allclose(value, (held[0][name] + held[1][name]) / 2, atol=1e-7)
    assert not torch.equal(mean['lm_head.weight'], held[0]['lm_head.weight'])
    with pytest.raises(UserError, match=r'average=4 is more than the 3 usable .* --keep_checkpoints=4'):
        checkpoint.average_weights(run, 4)
    (paths[0] / 'state.json').write_text('{}')
    assert checkpoint.average_weights(run, 2)[1] == [6, 4] and 'is damaged' in capsys.readouterr().err


def test_training_may_go_on_meanwhile(run, tiny):
    c = export_hf.ExportConfig(out_dir=run)
    gpt, weights, state, data = export_hf.load(c)
    train(replace(tiny, init_from='resume', max_iters=10))
    assert checkpoint.newest(run)[1]['step'] == 10
    sequences = export_hf.val_sequences(data, 64, gpt.block_size)
    found, steps = export_hf.averaged(c, gpt, weights, state, sequences)
    assert steps == [state['step']] == [8] and all(torch.equal(found[name], weights[name]) for name in weights)
    with pytest.raises(UserError, match=r'a checkpoint of step 10 has been written meanwhile: run the export again'):
        export_hf.averaged(replace(c, average=2), gpt, weights, state, sequences)


# -----------------------------------------------------------------------------
# The command
def test_the_command(run, monkeypatch, capsys, tmp_path):
    assert export(monkeypatch, f'--out_dir={run}', '--average=3', '--dtype=bfloat16') == 0
    out, folder = capsys.readouterr().out, tmp_path / 'out/hf'
    assert sorted(path.name for path in folder.iterdir()) == [
        'README.md', 'config.json', 'generation_config.json', 'model.safetensors', 'nanop.json', 'tokenizer.json',
        'tokenizer_config.json']
    assert not (tmp_path / 'out/hf.tmp').exists()
    alone, mean = (float(line.split()[-1]) for line in out.splitlines() if ': validation loss ' in line)
    assert f'step 8 alone: validation loss {alone:.4f}' in out and 'average of steps [4, 6, 8]' in out and alone != mean
    assert f'{mean:.4f} nats per token with transformers, {mean:.4f} with nanoP' in out
    assert 'logits differ by at most' in out and '8 greedy tokens are equal' in out and 'in bfloat16: loss ' in out
    # a user's script
    hf = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert hf.dtype == torch.bfloat16 and hf.config.bos_token_id == 10 and hf.config.eos_token_id is None
    weights, state = checkpoint.average_weights(run, 3)[0], checkpoint.newest(run)[1]
    gpt = GPTConfig(**state['model_config'])
    model = GPT.from_weights(gpt, weights).eval()
    pipe = transformers.pipeline('text-generation', model=hf.float(), tokenizer=tokenizer)
    said = pipe('abc de', max_new_tokens=8, do_sample=False)[0]['generated_text']
    ids = model.generate(torch.tensor([list(b'abc de')]), 8, temperature=0)[0].tolist()
    assert said == bytes(ids).decode()
    # the card
    card = (folder / 'README.md').read_text()
    for part in (state['meta']['data_sha256'], '--input_mult=1.7', '| completep |', 'base shape | n_layer 1, n_embd 16',
                 f"{mean:.4f} nats", f'{mean / math.log(2):.4f} bits per byte', 'the embeddings times 1.7',
                 'have left their parameterization', '1,024 in 8 steps', 'learning_rate 0.01', 'steps [4, 6, 8]'):
        assert part in card, part
    assert '| hidden_weight |' in card and '| residual_branch |' in card and 'kv_weight' not in card  # it has none
    assert str(tmp_path) not in card and state['config']['dataset'] not in card  # folders are the user's own business
    command = next(line for line in card.splitlines() if line.startswith('python train.py '))
    assert read_config(command.split()[2:]).density == 0.5
    with pytest.raises(UserError, match='exists: move it, or use --overwrite=True'):
        export(monkeypatch, f'--out_dir={run}')


def test_a_failed_check_says_so_and_leaves_everything(run, monkeypatch, capsys, tmp_path):
    old = tmp_path / 'out/hf/mine.txt'
    old.parent.mkdir()
    old.write_text('finetuned')
    real = export_hf.to_hf

    def without_one_bias(*arguments):
        target, hf_config, tensors, folded = real(*arguments)
        tensors['transformer.h.2.mlp.c_proj.bias'] = 3 * tensors['transformer.h.2.mlp.c_proj.bias']
        return target, hf_config, tensors, folded
    monkeypatch.setattr(export_hf, 'to_hf', without_one_bias)
    assert export(monkeypatch, f'--out_dir={run}', '--overwrite=True') == 1
    out = capsys.readouterr()
    assert 'hf.tmp\' is not this model: its logits differ by' in out.err and 'written' not in out.out
    assert old.read_text() == 'finetuned' and (tmp_path / 'out/hf.tmp/model.safetensors').exists()
    assert not (tmp_path / 'out/hf.tmp/README.md').exists() and len(checkpoint.find(run)) == 3


def test_the_check_sees_what_differs(tmp_path):
    """Every field of the findings, on a model of transformers that is compared with itself and with changed values."""
    torch.manual_seed(0)
    hf = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=11, n_positions=16, n_embd=8, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2)).eval()
    sequences = torch.randint(11, (5, 17))
    hf.generation_config.eos_token_id = None
    tokens = hf.generate(sequences[:1, :8], max_new_tokens=8, do_sample=False)[0, 8:]
    hf.generation_config.eos_token_id = tokens[3].item()  # the comparison must not end there
    hf.save_pretrained(tmp_path)
    with torch.no_grad():
        right = dict(sequences=sequences, logits=hf(sequences[:2, :-1]).logits, prompt=sequences[:1, :8].clone(),
                     greedy=tokens)
        loss = hf(sequences[:, :-1]).logits.flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(loss, sequences[:, 1:].flatten()).item()

    def find(**changes):
        save_file(right | changes, tmp_path / 'expected')
        return hf_check.findings(str(tmp_path), str(tmp_path / 'expected'), 'float32')
    found = find()
    assert found['loaded'] == {} and found['vocab_size'] == 11 and found['loss'] == pytest.approx(loss, rel=1e-6)
    assert found['difference'] < 1e-6 and found['greedy_gap'] == 0
    other = tokens.clone()
    other[5] = (other[5] + 1) % 11
    assert find(greedy=other)['greedy_gap'] > 1e-3
    logits = right['logits'].clone()
    logits[1, 15, 10] += 0.01 * logits.abs().max()
    assert find(logits=logits)['difference'] == pytest.approx(0.01, rel=0.05)
    assert find(logits=logits / 0)['difference'] == math.inf
    assert 'loss' not in find(logits=logits[..., :10].contiguous())
    held = load_file(tmp_path / 'model.safetensors')
    held.pop('transformer.h.0.mlp.c_proj.bias')
    save_file(held, tmp_path / 'model.safetensors', dict(format='pt'))
    assert find()['loaded'] == dict(missing_keys=['transformer.h.0.mlp.c_proj.bias'])


GOOD = dict(loaded={}, difference=1e-6, loss=2.0, greedy_gap=1e-6)


@pytest.mark.parametrize('change, problem', [
    ({}, None), (dict(difference=2e-5), 'logits differ'), (dict(difference=math.inf), 'logits differ'),
    (dict(loss=2.0001), 'validation loss is 2.000100'), (dict(loss=math.nan), 'validation loss is nan'),
    (dict(greedy_gap=1e-3), 'greedy tokens are others'),
    (dict(loaded=dict(missing_keys=['lm_head.weight'])), 'did not load it')])
def test_what_counts_as_a_problem(change, problem):
    found = export_hf.problems(GOOD | change, 2.0)
    assert not found if problem is None else len(found) == 1 and problem in found[0]


def test_what_cannot_be_exported_is_refused(tiny, monkeypatch, tmp_path):
    tiny.pos = 'alibi'
    train(tiny)
    with pytest.raises(UserError, match="pos='alibi'"):
        export(monkeypatch, f'--out_dir={tiny.out_dir}', '--target=gpt2')
    with pytest.raises(UserError, match='target'):
        export(monkeypatch, f'--out_dir={tiny.out_dir}', '--target=bloom')
    monkeypatch.setitem(sys.modules, 'transformers', None)
    with pytest.raises(UserError, match='export_hf.py needs transformers: pip install transformers'):
        export(monkeypatch, f'--out_dir={tiny.out_dir}')
    assert not [path for path in (tmp_path / 'out').iterdir() if path.name.startswith('hf')]


def test_alibi_goes_with_its_own_code(tiny, monkeypatch, tmp_path, capsys):
    tiny.pos, tiny.n_embd = 'alibi', 48
    train(tiny)
    assert export(monkeypatch, f'--out_dir={tiny.out_dir}') == 0
    assert "holds pos='alibi'" in capsys.readouterr().out
    folder = tmp_path / 'out' / 'hf'
    assert (folder / 'modeling_nanop.py').exists()
    assert 'trust_remote_code=True' in (folder / 'README.md').read_text()


# -----------------------------------------------------------------------------
# Evaluation
TASKS = dict(
    own_perplexity='''
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}]
''', own_choice='''
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: choices
doc_to_target: answer
target_delimiter: ""
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
''')


def test_lm_eval_finds_what_nanop_does(run, tmp_path, monkeypatch):
    lm_eval = pytest.importorskip('lm_eval', reason='needs lm_eval and accelerate (requirements-dev.txt)')
    pytest.importorskip('accelerate', reason='needs lm_eval and accelerate (requirements-dev.txt)')
    from lm_eval.tasks import TaskManager
    weights, state = checkpoint.load_weights(run)
    gpt = GPTConfig(**state['model_config'])
    model, folder = GPT.from_weights(gpt, weights).eval(), tmp_path / 'hf'
    _, hf_config, tensors, _ = export_hf.to_hf(export_hf.asdict(gpt), export_hf.multipliers(model), weights)
    export_hf.write_folder(folder, hf_config, tensors)
    written(folder, 'byte')

    generator, words = np.random.default_rng(0), ['abc ', 'de ', 'fghij ', 'a ', 'ij']
    docs = [dict(text=''.join(generator.choice(words, 2)) + 'd', choices=['e', 'q', '\u00e9'][::1 - 2 * (i % 2)],
                 answer=2 * (i % 2)) for i in range(12)]
    (tmp_path / 'docs.jsonl').write_text('\n'.join(map(json.dumps, docs)))
    for name, text in TASKS.items():
        (tmp_path / f'{name}.yaml').write_text(
            f'task: {name}\ntest_split: test\ndataset_path: json\n'
            f'dataset_kwargs: {{data_files: {{test: {tmp_path}/docs.jsonl}}, cache_dir: {tmp_path}/cache}}\n{text}')
    monkeypatch.setenv('HF_DATASETS_OFFLINE', '1')
    found = lm_eval.simple_evaluate(
        model='hf', model_args=f'pretrained={folder},prefix_token_id=10', tasks=list(TASKS), device='cpu', batch_size=4,
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False), bootstrap_iters=0)

    def log_likelihood(context, text):
        ids = torch.tensor([[*context, *text.encode()]])
        scores = model(ids[:, :-1])[0].log_softmax(-1).gather(-1, ids[:, 1:, None])
        return scores[0, len(context) - 1:].sum().item()
    nats = -sum(log_likelihood(b'\n', doc['text']) for doc in docs)
    bits = nats / math.log(2) / sum(len(doc['text']) for doc in docs)
    likeliest = [max(range(3), key=lambda i: log_likelihood(doc['text'].encode(), doc['choices'][i])) for doc in docs]
    accuracy = np.mean([own == doc['answer'] for own, doc in zip(likeliest, docs)])
    assert found['results']['own_perplexity']['bits_per_byte,none'] == pytest.approx(bits, rel=1e-5)
    assert found['results']['own_choice']['acc,none'] == accuracy
    for sample in found['samples']['own_choice']:
        for (score, _), choice in zip(sample['filtered_resps'], sample['doc']['choices']):
            assert score == pytest.approx(log_likelihood(sample['doc']['text'].encode(), choice), rel=1e-4)


# -----------------------------------------------------------------------------
# What users do
def test_checkpoints_of_another_run_are_not_averaged(run):
    path = checkpoint.find(run)[1]
    state = json.loads((path / 'state.json').read_text())
    state['model_config']['output_mult'] = 3.0
    (path / 'state.json').write_text(json.dumps(state))
    sums = json.loads((path / 'checksums.json').read_text())
    (path / 'checksums.json').write_text(json.dumps(sums | {'state.json': checksum(path / 'state.json')}))
    with pytest.raises(UserError, match='is of another run than .* its output_mult is another'):
        checkpoint.average_weights(run, 2)


def test_data_of_another_tokenizer_is_refused(run, monkeypatch, tmp_path):
    """Its ids mean other text: the loss in the model card would be of nonsense."""
    other = tmp_path / 'other'
    shutil.copytree(checkpoint.newest(run)[1]['config']['dataset'], other)
    meta = json.loads((other / 'meta.json').read_text())
    (other / 'meta.json').write_text(json.dumps(meta | dict(tokenizer='char', chars=''.join(map(chr, range(256))))))
    with pytest.raises(UserError, match='has another tokenizer than the run'):
        export(monkeypatch, f'--out_dir={run}', f'--dataset={other}')


def test_two_exports_of_one_run_do_not_mix(run, monkeypatch):
    """The second would write into the first one's folder, after its check."""
    real = export_hf.ask_transformers

    def meanwhile(*arguments):
        with pytest.raises(UserError, match='another process is exporting from'):
            export(monkeypatch, f'--out_dir={run}', '--tokenizer=False')
        return real(*arguments)
    monkeypatch.setattr(export_hf, 'ask_transformers', meanwhile)
    assert export(monkeypatch, f'--out_dir={run}') == 0 and not Path(run, 'hf.tmp').exists()


@pytest.mark.parametrize('package', ['tokenizers', 'safetensors'])
def test_a_full_disk_is_an_error_in_one_line(package, run, monkeypatch):
    def full(*arguments, **keys):
        raise Exception('No space left on device (os error 28)')  # neither package raises an OSError
    monkeypatch.setattr(*((transformers.PreTrainedTokenizerFast, 'save_pretrained') if package == 'tokenizers' else
                          (export_hf, 'save_file')), full)
    with pytest.raises(UserError, match='could not be written .*No space left.*make room'):
        export(monkeypatch, f'--out_dir={run}')
