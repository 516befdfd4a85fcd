"""Tests of the table of architectures in transformers: the logits are the same there, and back."""
import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from functools import cache

import pytest
import safetensors.torch
import torch

import sample
from model import GPT, GPTConfig
from nanop import checkpoint, hf_tokenizer, huggingface
from nanop.errors import UserError
from nanop.huggingface import TABLE, from_hf, multipliers, to_hf, write_folder
from nanop.layers import SparseLinear
from train import train

transformers = pytest.importorskip('transformers', reason='needs transformers (requirements-dev.txt)')

ODD = GPTConfig(  # m_N = 3, m_L = 5, another head_dim than the base's, multipliers that are no powers of two, padding
    block_size=48, vocab_size=64, real_vocab_size=61, n_layer=5, n_embd=48, head_dim=8, density=0.25, init_std=0.3,
    input_mult=1.7, attn_mult=1.3, output_mult=0.6, base_n_layer=1, base_n_embd=16, base_head_dim=4,
    parameterization='completep_supar')
CHANGES = dict(  # a model of each row
    gpt2=dict(pos='learned'), starcoder2=dict(pos='rope', n_kv_head=2),
    granite=dict(norm='rmsnorm', pos='rope', activation='swiglu', n_kv_head=2),
    llama=dict(norm='rmsnorm', pos='rope', activation='swiglu', n_kv_head=2),
    hyperclovax=dict(norm='rmsnorm', pos='rope', activation='swiglu', n_kv_head=2),
    arcee=dict(norm='rmsnorm', pos='rope', activation='relu2', n_kv_head=2),
    qwen3=dict(norm='rmsnorm', pos='rope', activation='swiglu', qk_norm=True, bias=False, n_kv_head=2),
    apertus=dict(norm='rmsnorm', pos='rope', activation='relu2', qk_norm=True, bias=False, n_kv_head=2),
    smollm3=dict(norm='rmsnorm', pos='none', activation='swiglu', n_kv_head=2),
    stablelm=dict(pos='rope', activation='swiglu', qk_norm=True, bias=False, n_kv_head=2),
    persimmon=dict(pos='rope', activation='relu', qk_norm=True, n_kv_head=2),
    gpt_neox=dict(pos='rope', n_kv_head=2), jais2=dict(pos='rope', activation='relu2', n_kv_head=2),
    nanop=dict(pos='alibi', activation='relu2', n_kv_head=2))


def trained(config, seed=0):
    """A model whose norms and biases are not those of a fresh one, with values under its masks, too."""
    model = GPT(config, torch.Generator().manual_seed(seed)).eval()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, p in model.weights():
            if p.dim() == 1:
                p.add_(0.3 * torch.randn(p.shape, generator=generator))
        for layer in model.modules():
            if isinstance(layer, SparseLinear):
                layer.weight[~layer.mask] = 0.1
    return model


def exported(model, target, folder, dtype='float32'):
    """The model in transformers, read from the folder to which it was written."""
    _, hf_config, tensors, folded = to_hf(asdict(model.config), multipliers(model), model.state_dict(), target)
    write_folder(folder, hf_config, tensors, dtype)
    hf, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not (info['missing_keys'] or info['unexpected_keys'] or info['mismatched_keys'])
    assert type(hf).__name__ == TABLE[target].architecture and hf.dtype == getattr(torch, dtype)
    return hf.eval(), folded


@cache
def ids(vocab_size=61):
    return torch.randint(vocab_size, (3, 16), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def difference(model, hf):
    """The largest difference of the logits, relative to the largest logit; padding ids are left out."""
    ours = model(ids())[0][..., :61]
    return ((ours - hf(ids()).logits).abs().max() / ours.abs().max()).item()


def agree(model, hf):
    greedy = hf.generate(ids()[:, :8], attention_mask=torch.ones(3, 8, dtype=torch.long), max_new_tokens=32,
                         do_sample=False, use_cache=True, pad_token_id=0)
    assert torch.equal(greedy, model.generate(ids()[:, :8], 32, temperature=0))
    assert difference(model, hf) <= 1e-5


@pytest.mark.parametrize('tied', [False, True])
@pytest.mark.parametrize('target', TABLE)
def test_every_row_has_the_same_logits_and_tokens(target, tied, tmp_path):
    model = trained(replace(ODD, tie_weights=tied, **CHANGES[target]))
    hf, folded = exported(model, target, tmp_path)
    agree(model, hf)
    assert len(folded) == (0 if TABLE[target].kept else 4)


@pytest.mark.parametrize('target', TABLE)
def test_every_row_in_bfloat16_is_as_far_off_as_its_rounding(target, tmp_path):
    """Weights rounded to 8 bits after the fold: as far from nanoP's logits as nanoP with its own weights rounded."""
    model = trained(replace(ODD, **CHANGES[target]))
    hf, _ = exported(model, target, tmp_path, 'bfloat16')
    rounded = trained(model.config)
    with torch.no_grad():
        for p in rounded.parameters():
            p.copy_(p.bfloat16())
        own = ((model(ids())[0] - rounded(ids())[0])[..., :61].abs().max() / model(ids())[0].abs().max()).item()
    assert 1e-5 < difference(model, hf.float()) < 3 * own


PLAIN = dict(n_kv_head=0, norm_gain=False, density=1.0, parameterization='depth_mup', attn_scale='1/d', alpha=0.75)


@pytest.mark.parametrize('changes', [
    PLAIN, PLAIN | dict(tie_weights=True), dict(bias=False), dict(activation='gelu'), dict(activation='relu'),
    dict(pos='none'), dict(parameterization='mup', tie_weights=True, unembed_form='multiplier', norm_gain=False),
    dict(parameterization='sp', unembed_form='weights', real_vocab_size=0, vocab_size=61), dict(n_kv_head=6)], ids=str)
def test_every_variant_that_a_row_holds(changes, tmp_path):
    for target, row in TABLE.items():
        c = replace(ODD, **CHANGES[target] | changes)
        if not huggingface.misfits(row, asdict(c)):
            model = trained(c)
            _, hf_config, tensors, _ = to_hf(asdict(c), multipliers(model), model.state_dict(), target)
            assert difference(model, in_memory(hf_config, tensors)) <= 1e-5, target


def scale(*names, by):
    def fault(config, tensors, c, m):
        for name in tensors:
            if name.endswith(names):
                tensors[name] *= by(m, c)
    return fault


def query_bias(config, tensors, c, m):
    for name in tensors:
        if name.endswith('c_attn.bias'):
            tensors[name][:c.n_embd] /= m['attention'] * c.head_dim ** 0.5


def swap(one, other):
    def fault(config, tensors, c, m):
        for name in [name for name in tensors if one in name]:
            twin = name.replace(one, other)
            tensors[name], tensors[twin] = tensors[twin], tensors[name]
    return fault


def change_all(name, change):
    def fault(config, tensors, c, m):
        tensors.update({key: change(value, c).contiguous() for key, value in tensors.items() if name in key})
    return fault


def keys(**values):
    return lambda config, tensors, c, m: config.update(values)


def partly_rotated(config, tensors, c, m):
    del config['rope_parameters'], config['partial_rotary_factor'], config['rotary_pct']


def query_factor(m, c):
    return m['attention'] * c.head_dim ** 0.5


FAULTS = [  # (what is done wrong, row, tied, how)
    ("branch on a projection's weight only", 'gpt2', False, scale('c_proj.bias', by=lambda m, c: 1 / m['branch'])),
    ('branch not on the MLP', 'llama', False, scale('down_proj.weight', by=lambda m, c: 1 / m['branch'])),
    ("attention on the query's weight only", 'gpt2', False, query_bias),
    ('attention on the keys, too', 'llama', False, scale('k_proj.weight', by=query_factor)),
    ('attention before the norm of queries', 'qwen3', False, lambda *given: [
        scale('q_norm.weight', by=lambda m, c: 1 / query_factor(m, c))(*given),
        scale('q_proj.weight', by=query_factor)(*given)]),
    ('embedding not on the positions', 'gpt2', False, scale('wpe.weight', by=lambda m, c: 1 / m['embedding'])),
    ("tied logits without the embedding's factor", 'llama', True, scale('model.norm.weight',
                                                                      by=lambda m, c: m['embedding'])),
    ("tied logits on the norm's gain only", 'gpt2', True,
     scale('ln_f.bias', by=lambda m, c: m['embedding'] / m['logits'])),
    ('untied logits forgotten', 'starcoder2', False, scale('lm_head.weight', by=lambda m, c: 1 / m['logits'])),
    ('gate and up swapped', 'llama', False, swap('gate_proj', 'up_proj')),
    ('keys and values swapped', 'arcee', False, swap('k_proj', 'v_proj')),
    ('not transposed', 'gpt2', False, change_all('attn.c_proj.weight', lambda w, c: w.t())),
    ('rows not by head', 'gpt_neox', False, change_all('query_key_value', lambda w, c: w.unflatten(
        0, (c.n_head, 3, -1)).transpose(0, 1).flatten(0, 2))),
    ('rows not by head, with norms', 'persimmon', False, change_all('query_key_value', lambda w, c: w.unflatten(
        0, (c.n_head, 3, -1)).transpose(0, 1).flatten(0, 2))),
    ('rotary_pct left at its default', 'gpt_neox', False, partly_rotated),
    ('eps of the norms left at its default', 'llama', False, keys(rms_norm_eps=1e-3)),
    ('exact GELU', 'starcoder2', False, keys(hidden_act='gelu')),
    ('another theta', 'llama', False, keys(rope_parameters=dict(rope_type='default', rope_theta=25000.0))),
    ('post norms left on', 'hyperclovax', False, keys(use_post_norm=True)),
    ('RoPE in every fourth layer', 'smollm3', False, keys(no_rope_layers=None)),
    ('logits_scaling as a factor', 'granite', False, lambda config, *_: config.update(
        logits_scaling=1 / config['logits_scaling'])),
    ('logits_scaling as a divisor', 'hyperclovax', False, lambda config, *_: config.update(
        logits_scaling=1 / config['logits_scaling'])),
    ('residual_multiplier dropped', 'granite', False, keys(residual_multiplier=1.0)),
    ('attention_multiplier dropped', 'granite', False, keys(attention_multiplier=8 ** -0.5)),
    ('embedding_multiplier dropped', 'granite', True, keys(embedding_multiplier=1.0)),
    ('tied although it is not', 'starcoder2', False, keys(tie_word_embeddings=True)),
]


def in_memory(hf_config, tensors):
    hf = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**hf_config))
    hf.load_state_dict(tensors, strict=False)
    return hf.eval()


@pytest.mark.parametrize('target, tied, fault', [pytest.param(*rest, id=what) for what, *rest in FAULTS])
def test_every_fault_is_seen(target, tied, fault):
    model = trained(replace(ODD, tie_weights=tied, **CHANGES[target]))
    mults = multipliers(model)
    _, hf_config, tensors, _ = to_hf(asdict(model.config), mults, model.state_dict(), target)
    with torch.no_grad():
        fault(hf_config, tensors, model.config, mults)
        assert difference(model, in_memory(hf_config, tensors)) > 1e-4


# -----------------------------------------------------------------------------
# Back
def written(model, target, folder, dtype='float32', ours=True):
    _, hf_config, tensors, folded = to_hf(asdict(model.config), multipliers(model), model.state_dict(), target)
    write_folder(folder, hf_config, tensors, dtype)
    if ours:
        content = dict(model_config=asdict(model.config), target=target, meta=dict(tokenizer='byte'))
        (folder / huggingface.OURS).write_text(json.dumps(content))
    return folded


def cut(model):
    """The weights as they act: without padding ids and what is masked."""
    weights = model.state_dict()
    return {name: value[:61] if 'wte' in name or 'lm_head' in name else
            value * weights.get(name.removesuffix('weight') + 'mask', True) for name, value in weights.items()}


@torch.no_grad()
def same_logits(model, back):
    expected = model(ids())[0][..., :61]
    return (expected - back(ids())[0]).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize('target', TABLE)
def test_everything_comes_back(target, tmp_path):
    """The config, the masks and the logits; bit for bit where nothing was folded, in bfloat16 but for its rounding."""
    for changes in dict(tie_weights=True), dict(norm_gain=False):
        model = trained(replace(ODD, **CHANGES[target] | changes))
        folded = written(model, target, tmp_path)
        back, meta = from_hf(str(tmp_path), GPT, replace(GPTConfig(), dropout=0.3))
        assert meta == dict(tokenizer='byte')
        assert back.config == replace(model.config, vocab_size=61, dropout=0.3)
        assert same_logits(model, back.eval())
        before, after = cut(model), back.state_dict()
        for name, value in before.items():
            exact = not folded or name.endswith('.mask')
            torch.testing.assert_close(after[name], value, rtol=0 if exact else 1e-6, atol=0 if exact else 1e-7)
    if TABLE[target].kept:
        written(model, target, tmp_path, 'bfloat16')
        after = from_hf(str(tmp_path), GPT, GPTConfig())[0].state_dict()
        assert all(torch.equal(after[name], value.bfloat16().float()) for name, value in before.items()
                   if not name.endswith('mask'))


@pytest.mark.parametrize('target', TABLE)
def test_nothing_is_rounded_where_nothing_is_folded(target, tmp_path):
    model = trained(replace(ODD, **CHANGES[target] | dict(
        parameterization='sp', input_mult=1.0, attn_mult=1.0, output_mult=1.0)))
    assert written(model, target, tmp_path) == []
    back, _ = from_hf(str(tmp_path), GPT, GPTConfig())
    assert all(torch.equal(back.state_dict()[name], value) for name, value in cut(model).items())


@pytest.mark.parametrize('target', TABLE)
def test_a_foreign_folder_keeps_its_logits_under_the_rules_of_the_config(target, tmp_path, capsys):
    c = replace(ODD, **CHANGES[target] | dict(tie_weights=target in ('gpt2', 'arcee')))
    model = trained(c)
    written(model, target, tmp_path, ours=False)
    rules = replace(ODD, parameterization='depth_mup', density=1.0, input_mult=0.3, n_layer=2)
    back, meta = from_hf(str(tmp_path), GPT, rules, block_size=32)
    assert 'trains under depth_mup with a base of 1 layers x 16' in capsys.readouterr().out
    assert meta == {} and back.config.parameterization == 'depth_mup' and back.config.input_mult == 0.3
    assert back.config.n_layer == 5 and back.config.block_size == 32
    assert same_logits(model, back.eval())
    assert min(map(abs, multipliers(back).values())) < 0.5  # the rules are at work


def test_an_edited_config_of_ours_is_followed_or_refused(tmp_path):
    model = trained(replace(ODD, **CHANGES['granite']))
    written(model, 'granite', tmp_path)
    config = json.loads((tmp_path / 'config.json').read_text())
    (tmp_path / 'config.json').write_text(json.dumps(config | dict(residual_multiplier=0.5)))
    hf = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    back = from_hf(str(tmp_path), GPT, GPTConfig())[0].eval()
    assert difference(back, hf) <= 1e-5 and difference(model, hf) > 1e-3
    (tmp_path / 'config.json').write_text(json.dumps(config | dict(hidden_act='relu')))
    with pytest.raises(UserError, match='has hidden_act=relu, it must be silu'):
        from_hf(str(tmp_path), GPT, GPTConfig())
    (tmp_path / huggingface.OURS).write_text('{}')
    (tmp_path / 'config.json').write_text(json.dumps(config))
    assert from_hf(str(tmp_path), GPT, GPTConfig())[1] == {}  # nothing is known: another's folder


def test_a_folder_that_was_trained_on_comes_back_or_is_refused(tmp_path):
    c = replace(ODD, **CHANGES['persimmon'] | dict(norm_gain=False))  # repeats heads, has gains and biases of its own
    model = trained(c)
    _, hf_config, tensors, _ = to_hf(asdict(c), multipliers(model), model.state_dict())
    for name, message in (('model.final_layernorm.weight', 'no place for ln_f.weight'),
                          ('model.layers.1.self_attn.query_key_value.weight', 'heads that differ')):
        written(model, 'persimmon', tmp_path)
        changed = tensors | {name: tensors[name] + torch.randn(tensors[name].shape)}
        write_folder(tmp_path, hf_config, changed)
        with pytest.raises(UserError, match=message):
            from_hf(str(tmp_path), GPT, GPTConfig())


@pytest.mark.parametrize('target, changes, message', [
    ('llama', dict(rms_norm_eps=1e-6), 'has rms_norm_eps=1e-06, it must be 1e-05'),
    ('gpt2', dict(n_head=0), 'cannot be loaded'),
    ('llama', dict(intermediate_size=100), 'has intermediate_size=100, it must be 128'),
    ('llama', dict(rope_parameters=dict(rope_type='default', rope_theta=5e5)), 'it must be .*10000'),
    ('llama', dict(rope_parameters=dict(rope_type='linear', factor=2.0, rope_theta=1e4)), 'it must be .*default'),
    ('gpt_neox', dict(use_parallel_residual=True), 'has use_parallel_residual=True, it must be False'),
    ('gpt_neox', dict(hidden_act='gelu'), "has the activation 'gelu', it must be gelu or relu or relu2, gelu in its"),
    ('smollm3', dict(no_rope_layers=[0, 1, 0, 0, 0]), 'it must be .0, 0, 0, 0, 0.'),
    ('llama', dict(num_hidden_layers=6), 'other tensors than its config says'),
    ('llama', dict(num_hidden_layers=4), 'other tensors than its config says'),
    ('stablelm', dict(use_qkv_bias=True), 'has use_qkv_bias=True, it must be False'),
    ('llama', dict(model_type='bert'), 'is of the architecture bert: nanoP holds gpt2, starcoder2')])
def test_what_nanop_does_not_hold_is_refused(target, changes, message, tmp_path):
    model = trained(replace(ODD, **CHANGES[target]))
    written(model, target, tmp_path, ours=False)
    config = json.loads((tmp_path / 'config.json').read_text())
    (tmp_path / 'config.json').write_text(json.dumps(config | changes))
    with pytest.raises(UserError, match=message):
        from_hf(str(tmp_path), GPT, GPTConfig())


@pytest.mark.parametrize('changes, target, message', [
    (dict(norm='rmsnorm'), 'gpt2', "target='gpt2' does not hold norm='rmsnorm': it needs norm='layernorm', use nanop"),
    (CHANGES['qwen3'] | dict(bias=True), 'qwen3', 'hold bias=True: it needs bias=False, use nanop or auto'),
    (dict(pos='rope'), 'gpt2', "does not hold pos='rope': it needs pos='learned' or 'none', use starcoder2 or auto"),
    (dict(pos='rope', activation='relu2'), 'starcoder2', "it needs activation='gelu' or 'relu', use jais2 or auto"),
    (dict(), 'gtp2', "target='gtp2' is not allowed: use one of auto, gpt2, starcoder2"),
    (dict(output_mult=0.0), 'auto', 'are not all above zero and finite')])
def test_what_no_architecture_holds_is_refused(changes, target, message):
    model = GPT(replace(ODD, **changes))
    with pytest.raises(UserError) as error:
        to_hf(asdict(model.config), multipliers(model), model.state_dict(), target)
    assert message in str(error.value)


@pytest.mark.parametrize('changes, message', [
    (dict(pos='alibi'), "holds pos='alibi' in this model (the nearest, gpt2, needs pos='learned' or 'none'): nanoP"),
    (dict(pos='rope', activation='swiglu'), "activation='swiglu' in this model (the nearest, starcoder2, ")])
def test_what_no_architecture_of_transformers_holds_is_said(changes, message, capsys):
    assert huggingface.choose(asdict(replace(ODD, **changes)), 'auto') == 'nanop'
    assert message in capsys.readouterr().out


OWN = [dict(pos=pos, norm=norm, activation=activation, qk_norm=qk_norm, bias=bias, n_kv_head=n_kv_head)
       for pos, norm, activation, qk_norm, bias, n_kv_head in (
    ('alibi', 'layernorm', 'relu2', False, True, 0), ('alibi', 'rmsnorm', 'swiglu', True, False, 2),
    ('learned', 'rmsnorm', 'swiglu', True, True, 2), ('rope', 'layernorm', 'swiglu', False, True, 3),
    ('none', 'layernorm', 'gelu', True, False, 0), ('rope', 'rmsnorm', 'relu', True, True, 1))]


@pytest.mark.parametrize('changes', OWN, ids=str)
def test_our_own_architecture_holds_the_rest(changes, tmp_path):
    for tied in False, True:
        model = trained(replace(ODD, tie_weights=tied, **changes))
        folded = written(model, 'nanop', tmp_path, ours=tied)
        hf = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        agree(model, hf)
        assert folded == [] and same_logits(model, from_hf(str(tmp_path), GPT, ODD)[0].eval())
        padded = torch.cat([torch.zeros(3, 5, dtype=torch.long), ids()], dim=1)  # on the left, as for a batch
        mask = torch.cat([torch.zeros(3, 5), torch.ones(3, 16)], dim=1).long()
        with torch.no_grad():
            out = hf(ids(), labels=ids())
            torch.testing.assert_close(hf(padded, attention_mask=mask).logits[:, 5:], out.logits, rtol=1e-4, atol=1e-4)
            with pytest.raises(ValueError, match='output_hidden_states is not supported'):
                hf(ids(), output_hidden_states=True)
            assert out.loss.item() == pytest.approx(torch.nn.functional.cross_entropy(
                out.logits[:, :-1].flatten(0, 1), ids()[:, 1:].flatten()).item())


ALONE = '''
import sys, torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
assert 'nanop.modeling_nanop' not in sys.modules and type(model).__module__.startswith('transformers_modules.')
ids = torch.tensor([[1, 2, 3, 4]])
expected = torch.load(sys.argv[2])
assert (model(ids).logits - expected).abs().max() <= 1e-5 * expected.abs().max()
model.save_pretrained(sys.argv[1] + '/again')
transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1] + '/again', trust_remote_code=True)
print(model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0).tolist())
'''


def test_our_own_architecture_needs_no_nanop(tmp_path):
    model = trained(replace(ODD, **CHANGES['nanop']))
    written(model, 'nanop', tmp_path)
    prompt = torch.tensor([[1, 2, 3, 4]])
    torch.save(model(prompt)[0][..., :61].detach(), tmp_path / 'expected.pt')
    result = subprocess.run(
        [sys.executable, '-c', ALONE, str(tmp_path), str(tmp_path / 'expected.pt')], cwd=tmp_path, text=True,
        capture_output=True, env=os.environ | dict(HF_HOME=str(tmp_path / 'home'), HF_HUB_OFFLINE='1'))
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.splitlines()[-1]) == model.generate(prompt, 8, temperature=0).tolist()


def test_auto_keeps_the_multipliers_if_it_can():
    assert {target: huggingface.choose(asdict(replace(ODD, **changes)), 'auto') for target, changes in CHANGES.items()
            } == {target: dict(llama='granite', hyperclovax='granite', gpt_neox='starcoder2').get(target, target)
                for target in TABLE}


def test_llama_cpp_finds_the_context_of_gpt2():
    """Its converter stops without this key, which transformers ignores."""
    model = GPT(ODD)
    assert to_hf(asdict(ODD), multipliers(model), model.state_dict(), 'gpt2')[1]['n_ctx'] == ODD.block_size


def test_weights_that_the_dtype_does_not_hold_are_refused(tmp_path):
    model = trained(replace(ODD, init_std=1e6))
    with pytest.raises(UserError, match="dtype='float16' does not hold all weights"):
        written(model, 'gpt2', tmp_path, 'float16')


def test_a_folder_is_trained_on_and_sampled_from(tiny, tmp_path, capsys):
    """In train.py and sample.py: a folder of nanoP's by itself, another one with its own tokenizer and the config's
    rules; steps from the folder change the loss from where it was."""
    tiny = replace(tiny, norm='rmsnorm', pos='rope', activation='swiglu', output_mult=1.7)
    loss = train(tiny)['val_loss']
    weights, state = checkpoint.load_weights(tiny.out_dir)
    model, folder = GPT.from_weights(GPTConfig(**state['model_config']), weights), tmp_path / 'llama'
    written(model, 'llama', folder)
    start = replace(tiny, out_dir='', init_from=str(folder), eval_only=True)
    assert train(start)['val_loss'] == pytest.approx(loss, abs=1e-6)
    assert train(replace(start, eval_only=False, max_iters=20))['val_loss'] < loss
    with pytest.raises(UserError, match="its parameterization is 'completep', not 'sp'"):
        train(replace(start, parameterization='sp'))
    with pytest.raises(UserError, match="its n_layer is 2, not 3"):
        train(replace(start, n_layer=3))
    sampled = sample.SampleConfig(init_from=str(folder))
    assert sample.load(sampled)[1].name == 'byte' and torch.equal(
        sample.load(sampled)[0].transformer.wte.weight, model.transformer.wte.weight)
    assert 'says how nanoP would tokenize' not in capsys.readouterr().out

    (folder / huggingface.OURS).unlink()
    with pytest.raises(UserError, match='holds no tokenizer'):
        sample.load(sampled)
    foreign = replace(start, parameterization='sp', output_mult=1.0)
    assert train(foreign)['val_loss'] == pytest.approx(loss, abs=1e-6)
    said = capsys.readouterr().out
    assert 'says how nanoP would tokenize' in said and 'trains under' not in said
    hf_tokenizer.write_tokenizer(folder, dict(tokenizer='byte'), 16)
    tokenizer = sample.load(sampled)[1]
    text = 'abc \u00e9\U0001f642'
    assert b''.join(map(tokenizer.token_bytes, tokenizer.encode(text))) == text.encode()
    more = transformers.AutoTokenizer.from_pretrained(folder)
    more.add_tokens(['one that the model lacks'])
    more.save_pretrained(folder)
    with pytest.raises(UserError, match='has 257 ids, its model only 256: use a folder'):
        sample.load(sampled)


def test_an_init_from_that_is_no_folder_is_refused(tiny, tmp_path):
    for kind in lambda name: replace(tiny, init_from=name), lambda name: sample.SampleConfig(init_from=name):
        for name in str(tmp_path), '', 'lama':
            with pytest.raises(UserError, match='or a folder with the config.json of transformers'):
                kind(name)


def test_tensors_that_nanop_lacks_are_not_dropped(tmp_path):
    config = transformers.GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=8, add_cross_attention=True)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match='crossattention.* for which nanoP has no place'):
        from_hf(str(tmp_path), GPT, GPTConfig())


@pytest.mark.parametrize('target', ['gpt2', 'llama'])
def test_a_tied_config_with_two_tensors_is_refused(target, tmp_path):
    """transformers keeps both, whatever the config says."""
    written(trained(replace(ODD, **CHANGES[target])), target, tmp_path)
    (tmp_path / huggingface.OURS).unlink()
    config = json.loads((tmp_path / 'config.json').read_text())
    (tmp_path / 'config.json').write_text(json.dumps(config | dict(tie_word_embeddings=True)))
    with pytest.raises(UserError, match='ties its embedding and unembedding in config.json, but holds two that differ'):
        from_hf(str(tmp_path), GPT, GPTConfig(parameterization='sp'))


@pytest.mark.parametrize('kind, keys, message', [
    ('granite', dict(head_dim=16), 'has head_dim=16, it must be 8'),
    ('starcoder2', dict(head_dim=16), 'has head_dim=16, it must be 8'),
    ('smollm3', dict(layer_types=['sliding_attention'] * 5, sliding_window=4), 'has layer_types=.*sliding'),
    ('qwen3', dict(layer_types=['sliding_attention'] * 5, sliding_window=4), 'has layer_types=.*sliding')])
def test_keys_that_an_architecture_reads_but_never_lists_are_refused(kind, keys, message, tmp_path):
    _, hf_config, *_ = to_hf(asdict(ODD) | CHANGES[kind], multipliers(trained(replace(ODD, **CHANGES[kind]))),
                             trained(replace(ODD, **CHANGES[kind])).state_dict(), kind)
    config = transformers.AutoConfig.for_model(**hf_config | keys)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=message):
        from_hf(str(tmp_path), GPT, GPTConfig(parameterization='sp'))


@pytest.mark.parametrize('file, content, message', [
    ('model.safetensors', b'version https://git-lfs.github.com/spec/v1', 'cannot be loaded'),
    ('model.safetensors', None, 'cannot be loaded'),  # cut off
    ('config.json', b'{"model_type": "gpt2", "n_embd": "48"}', 'cannot be loaded'),
    (huggingface.OURS, b'[1]', 'cannot be loaded'),
    (huggingface.OURS, b'{"model_config": {"new": 1}}', 'cannot be loaded')])
def test_a_damaged_folder_is_refused_in_one_line(file, content, message, tmp_path):
    written(trained(replace(ODD, **CHANGES['gpt2'])), 'gpt2', tmp_path)
    path = tmp_path / file
    path.write_bytes(path.read_bytes()[:5000] if content is None else content)
    with pytest.raises(UserError, match=message):
        from_hf(str(tmp_path), GPT, GPTConfig(parameterization='sp'))


def test_weights_that_are_not_finite_are_named(tmp_path):
    model = trained(replace(ODD, **CHANGES['gpt2']))
    _, hf_config, tensors, _ = to_hf(asdict(model.config), multipliers(model), model.state_dict(), 'gpt2')
    write_folder(tmp_path, hf_config, tensors)
    safetensors.torch.save_file(tensors | {'transformer.ln_f.weight': torch.full((48,), torch.nan)},
                                tmp_path / 'model.safetensors', dict(format='pt'))
    with pytest.raises(UserError, match='values in transformer.ln_f.weight that are not finite'):
        from_hf(str(tmp_path), GPT, GPTConfig(parameterization='sp'))


def test_a_folder_without_a_tokenizer_gets_none_made_up(tmp_path):
    written(trained(replace(ODD, **CHANGES['gpt2'])), 'gpt2', tmp_path)
    with pytest.raises(UserError, match='holds no tokenizer'):
        hf_tokenizer.FolderTokenizer(str(tmp_path))


def test_a_folder_called_gpt2_is_not_taken_for_openais(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'gpt2').mkdir()
    for kind in lambda name: replace(tiny, init_from=name), lambda name: sample.SampleConfig(init_from=name):
        with pytest.raises(UserError, match='a folder here has this name, too, use ./gpt2'):
            kind('gpt2')


def test_the_loss_of_our_own_architecture_counts_tokens_as_the_trainer_asks(tmp_path):
    """With gradient accumulation the Trainer divides nothing: the model divides by the tokens of all micro-batches."""
    hf, _ = exported(trained(replace(ODD, **CHANGES['nanop'])), 'nanop', tmp_path)
    mean, share = hf(ids(), labels=ids()).loss, hf(ids(), labels=ids(), num_items_in_batch=torch.tensor(90)).loss
    assert share.item() == pytest.approx(mean.item() * 45 / 90, rel=1e-6)  # 3 x 15 targets
