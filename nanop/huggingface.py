"""GPT-2's weights from transformers, as the config and the tensors that model.py takes."""
import re

from nanop.errors import UserError, explained, import_optional

GPT2_NAMES = ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl')


def load_gpt2(name, dropout=0.0, block_size=None):
    """(keys of GPTConfig, weights) of GPT-2, by one of GPT2_NAMES or a folder; block_size crops its positions."""
    transformers = import_optional('transformers', f"init_from='{name}'")
    with explained((OSError, ValueError), f"init_from='{name}' cannot be loaded"):
        hf = transformers.GPT2LMHeadModel.from_pretrained(name)
    c = hf.config
    if (block_size or 0) > c.n_positions:
        raise UserError(f"block_size={block_size} is more than the {c.n_positions} positions of '{name}': use fewer")
    needed = dict(activation_function=['gelu_new'], layer_norm_epsilon=[1e-5], n_inner=[None, 4 * c.n_embd],
                  tie_word_embeddings=[True], scale_attn_weights=[True], scale_attn_by_inverse_layer_idx=[False])
    for key, values in needed.items():
        if getattr(c, key) not in values:
            raise UserError(f"'{name}' has {key}={getattr(c, key)}, it must be {values[0]}")
    shape = dict(n_layer=c.n_layer, n_embd=c.n_embd, head_dim=c.n_embd // c.n_head)
    config = dict(block_size=block_size or c.n_positions, vocab_size=c.vocab_size, real_vocab_size=c.vocab_size,
                  tie_weights=True, dropout=dropout, parameterization='gpt2', **shape,
                  **{f'base_{key}': value for key, value in shape.items()})
    weights = {}
    for key, value in hf.state_dict().items():
        if re.search(r'(c_attn|c_proj|c_fc)\.weight$', key):
            value = value.t()  # Conv1D stores (in, out), Linear (out, in)
        if key == 'transformer.wpe.weight':
            value = value[:config['block_size']]
        if not key.endswith(('.attn.bias', '.attn.masked_bias')):  # causal masks, which old versions save
            weights[key] = value.contiguous()
    return config, weights
