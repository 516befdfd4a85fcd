"""
nanoP's GPT for transformers: what none of its own architectures holds, such as ALiBi.

This file travels with the weights and imports nothing of nanoP. Load the folder with trust_remote_code=True.
"""
import torch
import torch.nn as nn
from torch.nn import functional as F
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_outputs import CausalLMOutputWithPast

CACHE = 'cache' if 'cache' in CausalLMOutputWithPast.__dataclass_fields__ else 'past_key_values'  # its older name


class NanoPConfig(PretrainedConfig):
    model_type = 'nanop'  # the keys are those of config.json beside this file


def norm(config, size, bias):
    if config.norm == 'rmsnorm':
        return nn.RMSNorm(size, eps=1e-5)
    return nn.LayerNorm(size, eps=1e-5, bias=bias)


def rotate(x, positions):
    """Rotary positions (B, T) on x (B, H, T, D), in pairs (d, d + D/2)."""
    D = x.size(-1)
    angles = positions[:, None, :, None] * 10000.0 ** (-torch.arange(0, D, 2, device=x.device) / D)  # (B, 1, T, D / 2)
    (a, b), cos, sin = x.float().chunk(2, dim=-1), angles.cos(), angles.sin()
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


def attention_bias(config, x, T, keys, attention_mask):
    """What is added to the attention logits of the last T of `keys` tokens: (B or 1, H or 1, T, keys)."""
    at = torch.arange(keys, device=x.device)
    distance = at[-T:, None] - at  # (T, keys)
    bias = torch.zeros(1, 1, T, keys, dtype=x.dtype, device=x.device)
    if config.pos == 'alibi':  # fewer than 8 heads get the range of 8
        H = config.num_attention_heads
        slopes = 2.0 ** -torch.linspace(8 / max(H, 8), 8, H, device=x.device)
        bias = (-slopes[:, None, None] * distance).to(x.dtype)[None]
    hidden = distance < 0
    if attention_mask is not None:
        hidden = hidden | (attention_mask[:, None, None, -keys:] == 0)
    return bias.masked_fill(hidden, torch.finfo(x.dtype).min)


class NanoPAttention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.config, self.layer = config, layer
        self.head_dim = config.hidden_size // config.num_attention_heads
        kv = config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.use_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv, bias=config.use_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv, bias=config.use_bias)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.use_bias)
        if config.qk_norm:
            self.q_norm, self.k_norm = (norm(config, self.head_dim, bias=False) for _ in range(2))

    def forward(self, x, positions, bias, cache):
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
                   for proj in (self.q_proj, self.k_proj, self.v_proj))  # (B, heads, T, D)
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.config.pos == 'rope':
            q, k = rotate(q, positions), rotate(k, positions)
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
        y = F.scaled_dot_product_attention(q, k, v, bias, scale=self.config.attention_multiplier,
                                           enable_gqa=q.size(1) != k.size(1))
        return self.o_proj(y.transpose(1, 2).flatten(2))


class NanoPMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        C, d_ff, bias = config.hidden_size, config.intermediate_size, config.use_bias
        self.act = ACT2FN[config.hidden_act]
        self.gate_proj = nn.Linear(C, d_ff, bias) if config.hidden_act == 'silu' else None
        self.up_proj, self.down_proj = nn.Linear(C, d_ff, bias), nn.Linear(d_ff, C, bias)

    def forward(self, x):
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x) if self.gate_proj else
                              self.act(self.up_proj(x)))


class NanoPBlock(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.input_layernorm = norm(config, config.hidden_size, config.use_bias)
        self.self_attn = NanoPAttention(config, layer)
        self.post_attention_layernorm = norm(config, config.hidden_size, config.use_bias)
        self.mlp = NanoPMLP(config)
        self.residual_multiplier = config.residual_multiplier

    def forward(self, x, positions, bias, cache):
        x = x + self.residual_multiplier * self.self_attn(self.input_layernorm(x), positions, bias, cache)
        return x + self.residual_multiplier * self.mlp(self.post_attention_layernorm(x))


class NanoPForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = NanoPConfig
    base_model_prefix = 'model'
    _tied_weights_keys = {'lm_head.weight': 'model.embed_tokens.weight'}
    _no_split_modules = ['NanoPBlock']

    def __init__(self, config):
        super().__init__(config)
        self.model = nn.ModuleDict(dict(
            embed_tokens=nn.Embedding(config.vocab_size, config.hidden_size),
            layers=nn.ModuleList([NanoPBlock(config, layer) for layer in range(config.num_hidden_layers)]),
            norm=norm(config, config.hidden_size, config.use_bias)))
        if config.pos == 'learned':
            self.model['embed_positions'] = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.model['embed_tokens']

    def set_input_embeddings(self, value):
        self.model['embed_tokens'] = value

    def forward(self, input_ids, attention_mask=None, position_ids=None, past_key_values=None, cache=None, labels=None,
                use_cache=None, logits_to_keep=0, num_items_in_batch=None, **kwargs):
        for key in ('output_hidden_states', 'output_attentions', 'inputs_embeds'):
            if kwargs.get(key) is not None and kwargs[key] is not False:
                raise ValueError(f'{key} is not supported: this model returns logits for input_ids')
        T, c = input_ids.size(1), self.config
        cache = past_key_values if cache is None else cache
        if use_cache and cache is None:
            cache = DynamicCache()
        past = cache.get_seq_length() if cache is not None else 0
        if position_ids is None:  # padding on the left has no position
            seen = torch.ones_like(input_ids[:, :1]).expand(-1, past + T) if attention_mask is None else attention_mask
            position_ids = (seen.long().cumsum(-1) - 1).clamp(min=0)[:, -T:]
        x = self.model['embed_tokens'](input_ids)  # (B, T, C)
        if c.pos == 'learned':
            x = x + self.model['embed_positions'](position_ids)
        x = c.embedding_multiplier * x
        bias = attention_bias(c, x, T, past + T, attention_mask)
        for block in self.model['layers']:
            x = block(x, position_ids, bias, cache)
        logits = self.lm_head(c.logits_multiplier * self.model['norm'](x)[:, -logits_to_keep:])
        loss = None
        if labels is not None:
            # transformers' Trainer gives the tokens of all micro-batches, and then leaves the division to the model
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(),
                                   reduction='mean' if num_items_in_batch is None else 'sum')
            loss = loss / (1 if num_items_in_batch is None else num_items_in_batch)
        return CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: cache})
