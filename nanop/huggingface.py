"""
Models of Hugging Face transformers, and back: which architecture holds which model of model.py, exactly.

TABLE has a row for each architecture. The way there: split() takes nanoP's weights apart into q, k, v, gate, up and so
on; fold() multiplies what the architecture has no multiplier for into them; pairs() says under which name it keeps
each. The way back takes the same steps with the inverse numbers. Nothing is approximated: what a row
does not hold is refused, and what no architecture of transformers holds goes with our own modeling_nanop.py.
"""
import json
import math
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save as to_safetensors

from nanop.errors import UserError, explained, import_optional, require
from nanop.files import write_atomically
from nanop.parallel import say

GPT2_NAMES = ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl')
OURS = 'nanop.json'  # in a folder that nanoP wrote: the model_config, target and meta of the model


# -----------------------------------------------------------------------------
# The table
class Architecture(NamedTuple):
    """An architecture of transformers."""
    architecture: str  # its class
    holds: dict        # {key of GPTConfig: the values that it can hold}; of other keys it can hold all
    keys: dict         # {key of its config: key of GPTConfig, or another word of words()}
    fixed: dict        # {key of its config: the only value with which it computes what nanoP does}
    names: dict        # {part of the model: its name for it}, see pairs()
    kept: dict = {}    # {key of its config: (multiplier, exponent)}: what it multiplies by itself
    sets: dict = {}    # more of its config, which nanoP's forward does not depend on
    qkv: str = ''      # '': apart; stacked: rows of q, then k, then v; by_head: q, k and v of one head after another
    transposed: bool = False  # attention and MLP weights are stored as (inputs, outputs)


NOT_GATED = ('gelu', 'relu', 'relu2')
BIASED = dict(attention_bias='bias', mlp_bias='bias')
SHAPE = dict(hidden_size='n_embd', num_hidden_layers='n_layer', num_attention_heads='n_head', intermediate_size='d_ff',
             max_position_embeddings='block_size', vocab_size='ids', tie_word_embeddings='tie_weights',
             hidden_act='act')
GQA = SHAPE | dict(num_key_value_heads='kv_heads')  # fewer heads of keys and values than of queries
ROPE = dict(rope_parameters=dict(rope_type='default', rope_theta=10000.0, partial_rotary_factor=1.0))
FOR_OLD_READERS = dict(rope_theta=10000.0, partial_rotary_factor=1.0)  # transformers 4 and what reads its configs
LLAMA = {
    'wte': 'model.embed_tokens', 'ln_f': 'model.norm', 'lm_head': 'lm_head',
    'ln_1': 'model.layers.{}.input_layernorm', 'ln_2': 'model.layers.{}.post_attention_layernorm',
    **{f'attn.{part}': f'model.layers.{{}}.self_attn.{part}_proj' for part in 'qkvo'},
    **{f'mlp.{part}': f'model.layers.{{}}.mlp.{part}_proj' for part in ('gate', 'up', 'down')}}
QK_NORM = {f'attn.{part}_norm': f'model.layers.{{}}.self_attn.{part}_norm' for part in 'qk'}
NOT_GATED_NAMES = {part: name for part, name in LLAMA.items() if part != 'mlp.gate'}
MULTIPLIERS = dict(embedding_multiplier=('embedding', 1), attention_multiplier=('attention', 1),
                   residual_multiplier=('branch', 1))

TABLE = {  # by transformers' model_type; 'auto' takes the first row that holds the model
    'gpt2': Architecture(
        'GPT2LMHeadModel', dict(norm=('layernorm',), pos=('learned', 'none'), activation=NOT_GATED, qk_norm=(False,)),
        dict(n_embd='n_embd', n_layer='n_layer', n_head='n_head', n_inner='d_ff', n_ctx='block_size',  # llama.cpp's
             n_positions='block_size', vocab_size='ids', activation_function='act_gpt2',
             tie_word_embeddings='tie_weights'),
        dict(layer_norm_epsilon=1e-5, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False),
        {'wte': 'transformer.wte', 'wpe': 'transformer.wpe', 'ln_f': 'transformer.ln_f', 'lm_head': 'lm_head',
         'ln_1': 'transformer.h.{}.ln_1', 'ln_2': 'transformer.h.{}.ln_2', 'attn.qkv': 'transformer.h.{}.attn.c_attn',
         'attn.o': 'transformer.h.{}.attn.c_proj', 'mlp.up': 'transformer.h.{}.mlp.c_fc',
         'mlp.down': 'transformer.h.{}.mlp.c_proj'},
        sets=dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0), qkv='stacked', transposed=True),
    'starcoder2': Architecture(  # relu2 goes to jais2: llama.cpp always computes GELU here, relu2 there
        'Starcoder2ForCausalLM',
        dict(norm=('layernorm',), pos=('rope',), activation=('gelu', 'relu'), qk_norm=(False,)),
        GQA | dict(use_bias='bias'), ROPE | dict(norm_epsilon=1e-5, sliding_window=None),
        NOT_GATED_NAMES | {'mlp.up': 'model.layers.{}.mlp.c_fc', 'mlp.down': 'model.layers.{}.mlp.c_proj'},
        sets=dict(residual_dropout=0.0, embedding_dropout=0.0)),
    'jais2': Architecture(
        'Jais2ForCausalLM', dict(norm=('layernorm',), pos=('rope',), activation=('relu2',), qk_norm=(False,)),
        GQA | BIASED | dict(head_dim='head_dim'), ROPE | dict(layer_norm_eps=1e-5), NOT_GATED_NAMES),
    'granite': Architecture(
        'GraniteForCausalLM', dict(norm=('rmsnorm',), pos=('rope',), activation=('swiglu',), qk_norm=(False,)),
        GQA | BIASED, ROPE | dict(rms_norm_eps=1e-5), LLAMA,
        kept=MULTIPLIERS | dict(logits_scaling=('logits', -1))),  # a divisor
    'llama': Architecture(
        'LlamaForCausalLM', dict(norm=('rmsnorm',), pos=('rope',), activation=('swiglu',), qk_norm=(False,)),
        GQA | BIASED | dict(head_dim='head_dim'), ROPE | dict(rms_norm_eps=1e-5), LLAMA),
    'hyperclovax': Architecture(
        'HyperCLOVAXForCausalLM', dict(norm=('rmsnorm',), pos=('rope',), activation=('swiglu',), qk_norm=(False,)),
        GQA | BIASED | dict(head_dim='head_dim'), ROPE | dict(rms_norm_eps=1e-5, use_post_norm=False), LLAMA,
        kept=MULTIPLIERS | dict(logits_scaling=('logits', 1))),  # Granite's key, here a factor
    'arcee': Architecture(
        'ArceeForCausalLM', dict(norm=('rmsnorm',), pos=('rope',), activation=NOT_GATED, qk_norm=(False,)),
        GQA | BIASED | dict(head_dim='head_dim'), ROPE | dict(rms_norm_eps=1e-5), NOT_GATED_NAMES),
    'qwen3': Architecture(
        'Qwen3ForCausalLM',
        dict(norm=('rmsnorm',), pos=('rope',), activation=('swiglu',), qk_norm=(True,), bias=(False,)),
        GQA | dict(head_dim='head_dim'), ROPE | dict(rms_norm_eps=1e-5, attention_bias=False, use_sliding_window=False),
        LLAMA | QK_NORM),
    'apertus': Architecture(
        'ApertusForCausalLM',
        dict(norm=('rmsnorm',), pos=('rope',), activation=NOT_GATED, qk_norm=(True,), bias=(False,)),
        GQA, ROPE | dict(rms_norm_eps=1e-5, attention_bias=False),
        NOT_GATED_NAMES | QK_NORM | {'ln_1': 'model.layers.{}.attention_layernorm',
                                     'ln_2': 'model.layers.{}.feedforward_layernorm'}),
    'smollm3': Architecture(
        'SmolLM3ForCausalLM', dict(norm=('rmsnorm',), pos=('none',), activation=('swiglu',), qk_norm=(False,)),
        GQA | BIASED | dict(no_rope_layers='zeros'), dict(rms_norm_eps=1e-5, use_sliding_window=False), LLAMA),
    'stablelm': Architecture(
        'StableLmForCausalLM', dict(norm=('layernorm',), pos=('rope',), activation=('swiglu',), bias=(False,)),
        GQA | dict(qk_layernorm='qk_norm'),
        ROPE | dict(layer_norm_eps=1e-5, use_parallel_residual=False, use_qkv_bias=False),
        LLAMA | {f'attn.{part}_norm': f'model.layers.{{}}.self_attn.{part}_layernorm.norms.{{head}}' for part in 'qk'},
        sets=dict(hidden_dropout=0.0)),
    'persimmon': Architecture(
        'PersimmonForCausalLM', dict(norm=('layernorm',), pos=('rope',), activation=NOT_GATED, qk_norm=(True,)),
        SHAPE, ROPE | dict(layer_norm_eps=1e-5, qk_layernorm=True),
        {part: LLAMA[part] for part in ('wte', 'lm_head', 'ln_1', 'ln_2')} | {
            'ln_f': 'model.final_layernorm', 'attn.qkv': 'model.layers.{}.self_attn.query_key_value',
            'attn.o': 'model.layers.{}.self_attn.dense', 'attn.q_norm': 'model.layers.{}.self_attn.q_layernorm',
            'attn.k_norm': 'model.layers.{}.self_attn.k_layernorm', 'mlp.up': 'model.layers.{}.mlp.dense_h_to_4h',
            'mlp.down': 'model.layers.{}.mlp.dense_4h_to_h'},
        sets=dict(hidden_dropout=0.0), qkv='by_head'),
    'gpt_neox': Architecture(
        'GPTNeoXForCausalLM', dict(norm=('layernorm',), pos=('rope',), activation=NOT_GATED, qk_norm=(False,)),
        SHAPE | dict(hidden_act='act_gpt2', attention_bias='bias'),
        ROPE | dict(layer_norm_eps=1e-5, use_parallel_residual=False),
        {'wte': 'gpt_neox.embed_in', 'ln_f': 'gpt_neox.final_layer_norm', 'lm_head': 'lm_head',
         'ln_1': 'gpt_neox.layers.{}.input_layernorm', 'ln_2': 'gpt_neox.layers.{}.post_attention_layernorm',
         'attn.qkv': 'gpt_neox.layers.{}.attention.query_key_value', 'attn.o': 'gpt_neox.layers.{}.attention.dense',
         'mlp.up': 'gpt_neox.layers.{}.mlp.dense_h_to_4h', 'mlp.down': 'gpt_neox.layers.{}.mlp.dense_4h_to_h'},
        sets=dict(rotary_pct=1.0, hidden_dropout=0.0), qkv='by_head'),
    'nanop': Architecture(  # all the rest: our own modeling_nanop.py, which is written beside the weights
        'NanoPForCausalLM', {}, GQA | dict(use_bias='bias', norm='norm', pos='pos', qk_norm='qk_norm'), {},
        LLAMA | QK_NORM | {'wpe': 'model.embed_positions'},
        kept=MULTIPLIERS | dict(logits_multiplier=('logits', 1)),
        sets=dict(auto_map=dict(AutoConfig='modeling_nanop.NanoPConfig',
                                AutoModelForCausalLM='modeling_nanop.NanoPForCausalLM'))),
}
ACTIVATIONS = dict(gelu='gelu_pytorch_tanh', relu='relu', relu2='relu2', swiglu='silu')  # transformers' words


def words(config):
    """The keys of GPTConfig, as a dict, and what follows from them in the words of TABLE."""
    c = dict(config)
    n_head, N = c['n_embd'] // c['head_dim'], c['n_embd']
    return c | dict(
        n_head=n_head, kv_heads=c['n_kv_head'] or n_head, ids=c['real_vocab_size'] or c['vocab_size'],
        d_ff=8 * round(N / 3) if c['activation'] == 'swiglu' else 4 * N, zeros=[0] * c['n_layer'],
        act=ACTIVATIONS[c['activation']], act_gpt2=(ACTIVATIONS | dict(gelu='gelu_new'))[c['activation']])


def pairs(row, c):
    """(their name, our parts) of every module: model.layers.0.self_attn.q_proj and [h.0.attn.q]; with qkv in one
    matrix, our three parts. A part with a name for each {head} is there once for each."""
    for part, name in row.names.items():
        if part == 'lm_head' and c['tie_weights']:
            continue
        parts = [f'attn.{each}' for each in 'qkv'] if part == 'attn.qkv' else [part]
        heads = c['kv_heads'] if part == 'attn.k_norm' else c['n_head']
        for layer in range(c['n_layer'] if '{}' in name else 1):
            for head in range(heads if '{head}' in name else 1):
                prefix = f'h.{layer}.' if '{}' in name else ''
                yield name.format(layer, head=head), [prefix + each for each in parts]


# -----------------------------------------------------------------------------
# nanoP's weights in parts
def stacks(c):
    """{a linear layer of model.py: {each part stacked in its rows: how many}}."""
    q, kv = c['n_head'] * c['head_dim'], c['kv_heads'] * c['head_dim']
    keys_and_values = {'attn.k': kv, 'attn.v': kv}
    return {
        **({'attn.c_attn': {'attn.q': q}, 'attn.c_kv': keys_and_values} if c['n_kv_head'] else
           {'attn.c_attn': {'attn.q': q, **keys_and_values}}),
        'attn.c_proj': {'attn.o': c['n_embd']}, 'mlp.c_proj': {'mlp.down': c['n_embd']},
        'mlp.c_fc': {**({'mlp.gate': c['d_ff']} if c['activation'] == 'swiglu' else {}), 'mlp.up': c['d_ff']}}


def neutral(c):
    """{part: the value that does nothing} of all norms, biases and positions: what a model may lack."""
    norms, biases = {'ln_f': c['n_embd']}, {}
    for layer in range(c['n_layer']):
        norms |= {f'h.{layer}.ln_1': c['n_embd'], f'h.{layer}.ln_2': c['n_embd']}
        norms |= {f'h.{layer}.attn.{each}_norm': c['head_dim'] for each in 'qk' if c['qk_norm']}
        biases |= {f'h.{layer}.{part}': rows for parts in stacks(c).values() for part, rows in parts.items()}
    return {'wpe.weight': torch.zeros(c['block_size'], c['n_embd']),
            **{f'{part}.weight': torch.ones(rows) for part, rows in norms.items()},
            **{f'{part}.bias': torch.zeros(rows) for part, rows in {**norms, **biases}.items()}}


def require_neutral(c, parts, names, problem):
    """Refuse to leave out the parts called `names` unless they do nothing. A factor that went in and out rounds."""
    nothing = neutral(c)
    lost = [name for name in names if name not in nothing or not torch.allclose(nothing[name], parts[name], 1e-6, 0)]
    if lost:
        raise UserError(f"{problem} {', '.join(sorted(lost)[:3])}{' and others' if len(lost) > 3 else ''}")


def layer_and_module(name):
    """('h.3.', 'attn.c_attn', 'weight') of a tensor called transformer.h.3.attn.c_attn.weight."""
    return re.fullmatch(r'(?:transformer\.)?(h\.\d+\.|)(.*)\.(\w+)', name).groups()


def split(c, weights):
    """{part: tensor} of nanoP's weights: masked ones are zero, ids of padding are cut, neutral() is there as well."""
    parts, stacked = neutral(c), stacks(c)
    for name, value in weights.items():
        layer, module, kind = layer_and_module(name)
        if kind == 'mask' or module == 'lm_head' and c['tie_weights']:
            continue
        value = value.detach().to(torch.float32)
        mask = weights.get(name.removesuffix('weight') + 'mask') if kind == 'weight' else None
        value = value if mask is None else value * mask
        value = value[:c['ids']] if module in ('wte', 'lm_head') else value
        rows = stacked.get(module, {module: len(value)})
        parts |= {f'{layer}{part}.{kind}': piece for part, piece in zip(rows, value.split(list(rows.values())))}
    return parts


def unsplit(c, parts, names):
    """The inverse of split(): weights called `names`. Raises UserError if they would leave out something."""
    weights, left, stacked = {}, set(parts), stacks(c)
    for name in names:
        layer, module, kind = layer_and_module(name)
        if kind == 'mask':  # a trained model is masked where its weights are zero
            weights[name] = weights[name.removesuffix('mask') + 'weight'] != 0
            continue
        module = 'wte' if module == 'lm_head' and c['tie_weights'] else module
        pieces = [f'{layer}{part}.{kind}' for part in stacked.get(module, [module])]
        weights[name], left = torch.cat([parts[piece] for piece in pieces]), left - set(pieces)
    require_neutral(c, parts, left, 'this config of nanoP has no place for')
    return weights


# -----------------------------------------------------------------------------
# The fold
def multipliers(model):
    """The four numbers by which a GPT multiplies its embedding, residual branches, Q K^T and logits."""
    block = model.transformer.h[0]
    return dict(embedding=model.input_mult, branch=block.branch_mult, attention=block.attn.logit_mult,
                logits=model.output_mult)


def kept_multipliers(row, c, get):
    """The four numbers by which an architecture multiplies; get(key of its config) is one of those that it keeps."""
    return dict(embedding=1.0, branch=1.0, attention=c['head_dim'] ** -0.5, logits=1.0) | {
        name: get(key) ** exponent for key, (name, exponent) in row.kept.items()}


def fold(c, parts, ours, theirs):
    """Put the ratio of our four multipliers to theirs into the weights. Returns (parts, what was multiplied, in words).

    Biases of a residual projection are multiplied as its weights are. The factor on Q K^T goes on the queries; with
    norms of queries and keys on the gain of the norm, which would undo it. A tied lm_head has the embedding's factor
    already, so that the final norm takes what is left.
    """
    if not all(0 < value < math.inf for value in (*ours.values(), *theirs.values())):
        raise UserError(f'multipliers {ours} are not all above zero and finite: there is nothing to put into weights')
    by = {name: ours[name] / theirs[name] for name in ours}
    folds = [('the embeddings', r'(wte|wpe)\.weight', by['embedding']),
             ('the projections back to the residual stream', r'.*(attn\.o|mlp\.down)\.(weight|bias)', by['branch']),
             ('the gains of q_norm', r'.*attn\.q_norm\.weight', by['attention']) if c['qk_norm'] else
             ('the queries', r'.*attn\.q\.(weight|bias)', by['attention']),
             ('the final norm, before the tied unembedding', r'ln_f\.(weight|bias)', by['logits'] / by['embedding'])
             if c['tie_weights'] else ('the unembedding', r'lm_head\.weight', by['logits'])]
    folds = [each for each in folds if not math.isclose(each[-1], 1, rel_tol=1e-12)]
    parts = dict(parts)
    for _, pattern, factor in folds:
        parts |= {part: value * factor for part, value in parts.items() if re.fullmatch(pattern, part)}
    return parts, [f'{what} times {factor:.6g}' for what, _, factor in folds]


# -----------------------------------------------------------------------------
# There
def with_our_own(needed_by):
    """transformers, which then knows modeling_nanop.py, too."""
    transformers = import_optional('transformers', needed_by)
    from nanop.modeling_nanop import NanoPConfig, NanoPForCausalLM
    transformers.AutoConfig.register('nanop', NanoPConfig, exist_ok=True)
    transformers.AutoModelForCausalLM.register(NanoPConfig, NanoPForCausalLM, exist_ok=True)
    return transformers


def misfits(row, config):
    return {key: config[key] for key, values in row.holds.items() if config[key] not in values}


def choose(config, target):
    """The name of the row of TABLE for a config, which `target` names or leaves open. Raises UserError if it does not
    hold the config. If no architecture of transformers does, says why it is nanoP's own."""
    if target not in ('auto', *TABLE):
        raise UserError(f"target='{target}' is not allowed: use one of auto, {', '.join(TABLE)}")
    fits = [name for name, row in TABLE.items() if not misfits(row, config)]
    if target in fits or target == 'auto' and fits[0] != 'nanop':
        return target if target in fits else fits[0]
    nearest = target if target != 'auto' else min(list(TABLE)[:-1], key=lambda name: len(misfits(TABLE[name], config)))
    wrong = misfits(TABLE[nearest], config)
    needs = ' and '.join(f"{key}={' or '.join(map(repr, TABLE[nearest].holds[key]))}" for key in wrong)
    wrong = ' with '.join(f'{key}={value!r}' for key, value in wrong.items())
    if target != 'auto':
        raise UserError(f"target='{target}' does not hold {wrong}: it needs {needs}, use {fits[0]} or auto")
    say(f'note: no architecture of transformers holds {wrong} in this model (the nearest, {nearest}, needs {needs}): '
        f"nanoP's own is written beside the weights, load it with trust_remote_code=True")
    return 'nanop'


def repeated(c, x):
    """Keys or values (kv_heads * D, ..) with a copy for each query head, (H * D, ..)."""
    heads = x.unflatten(0, (c['kv_heads'], c['head_dim']))
    return heads.repeat_interleave(c['n_head'] // c['kv_heads'], dim=0).flatten(0, 1)


def is_transposed(row, ours, value):
    return row.transposed and value.dim() == 2 and ours[0].startswith('h.')


def join(row, c, ours, parts, kind):
    """One tensor of theirs, weight or bias, from our parts."""
    pieces = [parts[f'{part}.{kind}'] for part in ours]
    value = pieces[0]
    if len(pieces) == 3:
        q, k, v = pieces[0], repeated(c, pieces[1]), repeated(c, pieces[2])
        value = torch.cat([q, k, v])
        if row.qkv == 'by_head':
            value = value.unflatten(0, (3, c['n_head'], c['head_dim'])).transpose(0, 1).flatten(0, 2)
    return value.t() if is_transposed(row, ours, value) else value


def unjoin(row, c, ours, value, kind):
    """The inverse of join(): {our part: tensor}. Of keys and values that are repeated the first are taken."""
    value = (value.t() if is_transposed(row, ours, value) else value).clone()
    if len(ours) == 1:
        return {f'{ours[0]}.{kind}': value}
    if row.qkv == 'by_head':
        value = value.unflatten(0, (c['n_head'], 3, c['head_dim'])).transpose(0, 1).flatten(0, 2)
    q, k, v = value.chunk(3)
    group = c['n_head'] // c['kv_heads']
    k, v = (x.unflatten(0, (-1, group, c['head_dim']))[:, 0].flatten(0, 1) for x in (k, v))
    return {f'{part}.{kind}': piece for part, piece in zip(ours, (q, k, v))}


def to_hf(config, mults, weights, target='auto'):
    """(row of TABLE, config of transformers, tensors, what was folded in words) of a trained model.

    `config`: asdict(GPTConfig). `mults`: its multipliers(). `weights`: {name: tensor}, with masks if it has any. Raises
    UserError, with the reason, for a model that the architecture `target`, or with 'auto' none, holds exactly.
    """
    target = choose(config, target)
    row, c = TABLE[target], words(config)
    transformers = with_our_own('the export to Hugging Face')
    hf_config = dict(
        architectures=[row.architecture], model_type=target, bos_token_id=None, eos_token_id=None, pad_token_id=None,
        **{key: c[word] for key, word in row.keys.items()}, **row.fixed, **row.sets,
        **{key: mults[name] ** exponent for key, (name, exponent) in row.kept.items()},
        **(FOR_OLD_READERS if 'rope_parameters' in row.fixed else {}))
    parts, folded = fold(c, split(c, weights), mults, kept_multipliers(row, c, hf_config.get))
    with torch.device('meta'):  # the architecture says which tensors it has
        theirs = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**hf_config))
    theirs, tensors, used = {name: value.shape for name, value in theirs.state_dict().items()}, {}, set()
    for name, ours in pairs(row, c):
        for kind in ('weight', 'bias'):
            if f'{name}.{kind}' in theirs:
                value = join(row, c, ours, parts, kind)  # two may be one tensor, so they are copied
                tensors[f'{name}.{kind}'] = value.clone(memory_format=torch.contiguous_format)
                used |= {f'{part}.{kind}' for part in ours}
    tied = {'lm_head.weight'} if c['tie_weights'] else set()
    assert {name: value.shape for name, value in tensors.items()} == {
        name: shape for name, shape in theirs.items() if name not in tied}, 'the table names other tensors'
    require_neutral(c, parts, set(parts) - used, f'{target} has no place for')
    return target, hf_config, tensors, folded


def write_folder(folder, hf_config, tensors, dtype='float32'):
    """Write config.json, generation_config.json and model.safetensors, in float32, bfloat16 or float16."""
    folder = Path(folder)
    tensors = {name: value.to(getattr(torch, dtype)).contiguous() for name, value in tensors.items()}
    if not all(value.isfinite().all() for value in tensors.values()):
        raise UserError(f"dtype='{dtype}' does not hold all weights, or they are not finite: use dtype=float32")
    own = Path(__file__).with_name('modeling_nanop.py')
    special = {key: hf_config[key] for key in ('bos_token_id', 'eos_token_id', 'pad_token_id')
               if hf_config.get(key) is not None}
    with explained(OSError, f"'{folder}' could not be written"):
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / 'model.safetensors', to_safetensors(tensors, dict(format='pt')))
        if 'auto_map' in hf_config:
            write_atomically(folder / own.name, own.read_bytes())
        for name, content in (('config.json', hf_config | dict(dtype=dtype, torch_dtype=dtype)),
                              ('generation_config.json', special)):
            write_atomically(folder / name, (json.dumps(content, indent=2) + '\n').encode())


# -----------------------------------------------------------------------------
# Back
def keys_of(row, name, hf):
    """The keys of GPTConfig that a config of transformers states. Raises UserError if it states what nanoP has not."""
    held = {word: getattr(hf, key, None) for key, word in row.keys.items()}
    act = held.get('act', held.get('act_gpt2'))
    activations = row.holds.get('activation', ACTIVATIONS)
    activation = {theirs: ours for ours, theirs in (*ACTIVATIONS.items(), ('gelu', 'gelu_new'))}.get(act)
    if activation not in activations:
        allowed = ' or '.join(activations)
        raise UserError(f"'{name}' has the activation {act!r}, it must be {allowed}, gelu in its tanh form")
    held = {key: values[0] for key, values in row.holds.items()} | held
    norm, n_embd, n_head = held['norm'], held['n_embd'], held['n_head']
    biases = [getattr(hf, key) for key, word in row.keys.items() if word == 'bias']
    keys = dict(
        n_layer=held['n_layer'], n_embd=n_embd, head_dim=n_embd // n_head, block_size=held['block_size'],
        n_kv_head=0 if held.get('kv_heads', n_head) == n_head else held['kv_heads'], vocab_size=held['ids'],
        real_vocab_size=held['ids'], tie_weights=held['tie_weights'], activation=activation, norm=norm, norm_gain=True,
        pos=held['pos'], qk_norm=held['qk_norm'], density=1.0,
        bias=norm == 'layernorm' or any(biases))
    require_config(row, name, hf, keys)
    return keys


def require_config(row, name, hf, keys):
    """Refuse a config of transformers with which its architecture would compute something else than nanoP does."""
    c = words(keys)
    needed = {key: c[word] for key, word in row.keys.items() if word != 'bias'} | row.fixed | dict(
        head_dim=c['head_dim'], layer_types=['full_attention'] * c['n_layer'])  # which some read, too
    for key, value in needed.items():
        theirs = getattr(hf, key, None)
        same = value in ('gelu_new', ACTIVATIONS['gelu']) and theirs in ('gelu_new', ACTIVATIONS['gelu'])
        follows = theirs is None and key in ('n_inner', 'n_ctx', 'head_dim', 'layer_types')  # from other keys
        theirs = {**value, **theirs} if isinstance(value, dict) else theirs
        if theirs != value and not (same or follows):
            raise UserError(f"'{name}' has {key}={theirs}, it must be {value}")


def read_parts(row, c, name, tensors):
    """{part: tensor} of an architecture's tensors. Raises UserError for one that nanoP does not have."""
    broken = [key for key, value in tensors.items() if not value.isfinite().all()]
    if broken:
        raise UserError(f"'{name}' has values in {broken[0]} that are not finite: use weights from before it diverged")
    head, embedding = (tensors.get(f'{module}.weight') for module in ('lm_head', row.names['wte']))
    if c['tie_weights'] and head is not None and embedding is not None and not torch.equal(head, embedding):
        raise UserError(f"'{name}' ties its embedding and unembedding in config.json, but holds two that differ: set "
                        'tie_word_embeddings to false there if the weights are right')
    parts, left = {}, set(tensors) - ({'lm_head.weight'} if c['tie_weights'] else set())
    for module, ours in pairs(row, c):
        for kind in ('weight', 'bias'):
            if f'{module}.{kind}' not in tensors:
                continue
            value = tensors[f'{module}.{kind}']
            new = unjoin(row, c, ours, value, kind)
            if not torch.equal(join(row, c, ours, new, kind), value) or any(
                    part in parts and not torch.equal(parts[part], piece) for part, piece in new.items()):
                raise UserError(f"'{name}' has heads that differ in {module}.{kind} where nanoP's are the same")
            parts, left = parts | new, left - {f'{module}.{kind}'}
    if left:
        raise UserError(f"'{name}' has {min(left)}, for which nanoP has no place")
    return parts


def require_start(config, others):
    """Refuse config.init_from unless it is one of `others`, of GPT2_NAMES or a folder of transformers."""
    names, name = (*others, *GPT2_NAMES), config.init_from
    require(config, 'init_from', name in names or name and Path(name, 'config.json').is_file(),
            f"use one of {', '.join(names)}, or a folder with the config.json of transformers")
    require(config, 'init_from', name not in GPT2_NAMES or not Path(name).is_dir(),
            f"a folder here has this name, too, use ./{name} for the folder, or another working directory for OpenAI's")


def from_hf(name, model_class, config, block_size=None):
    """(model, meta) of one of GPT2_NAMES or of a folder of transformers, with the same logits.

    `model_class`: model.py's GPT. `config`: a GPTConfig; its shape becomes the folder's, the rules, base values and
    dropout stay, and their multipliers are divided out of the weights. From a folder that nanoP wrote, everything but
    dropout is the folder's. block_size crops the positions. `meta` describes the data as far as it is known. Raises
    UserError for what nanoP does not hold.
    """
    transformers = with_our_own(f"init_from='{name}'")  # code in the folder is never run
    problem = f"init_from='{name}' cannot be loaded"
    with explained(Exception, problem):  # transformers and safetensors raise all kinds
        saved = json.loads(Path(name, OURS).read_text()) if Path(name, OURS).exists() else {}
        keys = asdict(type(config)(**saved['model_config'])) if saved else {}
        hf_config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
    if hf_config.model_type not in TABLE:
        raise UserError(f"'{name}' is of the architecture {hf_config.model_type}: nanoP holds {', '.join(TABLE)}")
    row = TABLE[hf_config.model_type]
    if saved:
        keys |= dict(vocab_size=hf_config.vocab_size, real_vocab_size=hf_config.vocab_size, dropout=config.dropout)
        require_config(row, name, hf_config, keys)
    else:
        with explained((ArithmeticError, TypeError), problem):  # of values that are no sizes
            keys = keys_of(row, name, hf_config)
    positions = keys['block_size']
    if (block_size or 0) > positions:
        raise UserError(f"block_size={block_size} is more than the {positions} positions of '{name}': use fewer")
    with explained(Exception, problem):
        hf, info = transformers.AutoModelForCausalLM.from_pretrained(
            name, dtype=torch.float32, output_loading_info=True, trust_remote_code=False)
    wrong = [key for kind in ('missing_keys', 'unexpected_keys', 'mismatched_keys') for key in info[kind]
             if not re.search(r'(masked_bias|inv_freq)$', str(key))]  # constants, which old versions save
    if wrong:
        raise UserError(f"'{name}' holds other tensors than its config says, such as {wrong[0]}")
    c = words(keys)
    parts = neutral(c) | read_parts(row, c, name, hf.state_dict())
    config = replace(config, **keys | dict(block_size=block_size or positions))
    with torch.device('meta'):
        model = model_class(config)
    theirs = kept_multipliers(row, c, lambda key: getattr(hf_config, key))
    parts, _ = fold(c, parts, theirs, multipliers(model))
    parts['wpe.weight'] = parts['wpe.weight'][:config.block_size]
    weights = unsplit(words(asdict(config)), parts, model.state_dict())
    if not saved and config.parameterization not in ('gpt2', 'sp'):
        say(f"note: '{name}' trains under {config.parameterization} with a base of {config.base_n_layer} layers x "
            f'{config.base_n_embd}, which nothing in it states: use --parameterization=sp to rescale nothing')
    meta = dict(tokenizer='gpt2') if name in GPT2_NAMES else saved.get('meta', {})
    if not meta:
        say(f"note: nothing in '{name}' says how nanoP would tokenize: its ids must mean what those of your data mean")
    return model_class.from_weights(config, weights), meta
