"""Sampling: one token at a time, with the keys and values of earlier tokens kept."""
import codecs
import math

import torch
from torch.nn import functional as F

from nanop.errors import UserError
from nanop.tokenizer import prompt_ids

COLDEST, HOTTEST = 1e-30, 1e30  # temperatures beyond would overflow; their samples are the same


class KeyValueCache:
    """Keys and values that one attention layer has computed so far, so that each is computed once."""

    def __init__(self, size):
        self.size, self.length, self.kv = size, 0, None

    def append(self, k, v):
        """Add k and v (B, H, T, D) of the new tokens; returns those of all tokens so far, (B, H, length, D) each."""
        if self.kv is None:
            self.kv = [x.new_empty(*x.shape[:2], self.size, x.size(-1)) for x in (k, v)]
        start, self.length = self.length, self.length + k.size(2)
        for kept, new in zip(self.kv, (k, v)):
            kept[:, :, start:self.length] = new
        return [kept[:, :, :self.length] for kept in self.kv]


@torch.no_grad()
def stream(model, ids, max_new_tokens, temperature=1.0, top_k=None, generator=None):
    """Yield one new token (B, 1) after the other to continue ids (B, T). Temperature 0 takes the likeliest token."""
    c, layers, caches = model.config, [block.attn for block in model.transformer.h], None
    for _ in range(max_new_tokens):
        if caches is None or caches[0].length == c.block_size:  # a full window moves, and with it every position
            caches, new = [KeyValueCache(c.block_size) for _ in layers], ids[:, -c.block_size:]
        for layer, cache in zip(layers, caches):
            layer.cache = cache
        cudnn = torch.backends.cuda.cudnn_sdp_enabled()
        torch.backends.cuda.enable_cudnn_sdp(False)  # it would plan anew for every number of keys, up to 0.4 s each
        try:
            logits = model.unembed(model.features(new)[:, -1]).float()  # (B, V)
        finally:  # the caller may use the model between two tokens
            torch.backends.cuda.enable_cudnn_sdp(cudnn)
            for layer in layers:
                layer.cache = None
        if not logits.isfinite().all():
            raise UserError("the model's logits are not finite: train it with a lower learning_rate or dtype=float32")
        logits[:, c.real_vocab_size or c.vocab_size:] = -math.inf
        if top_k:
            smallest = torch.topk(logits, min(top_k, logits.size(-1))).values[:, [-1]]
            logits[logits < smallest] = -math.inf
        if temperature == 0:
            new = logits.argmax(dim=-1, keepdim=True)
        else:
            scaled = (logits - logits.amax(-1, keepdim=True)) / min(max(temperature, COLDEST), HOTTEST)
            new = torch.multinomial(F.softmax(scaled, dim=-1), 1, generator=generator)
        ids = torch.cat((ids, new), dim=1)
        yield new


def print_sample(model, tokenizer, start, max_new_tokens, temperature=0.8, top_k=200, seed=1337):
    """Print `start` and then max_new_tokens tokens as they come."""
    device = next(model.parameters()).device
    prompt = torch.tensor([prompt_ids(tokenizer, start)], device=device)
    generator = torch.Generator(device).manual_seed(seed)
    decoder = codecs.getincrementaldecoder('utf-8')(errors='replace')  # a character may span several tokens
    print(start, end='', flush=True)
    for token in stream(model, prompt, max_new_tokens, temperature, top_k, generator):
        print(decoder.decode(tokenizer.token_bytes(token.item())), end='', flush=True)
    print(decoder.decode(b'', final=True))


def show_sample(config, model, data):
    """Print the sample with which a run ends."""
    c = config
    print(f'a sample of {c.sample_tokens} tokens (python sample.py --out_dir={c.out_dir} for more):')
    print_sample(model.eval(), data.tokenizer(), '', c.sample_tokens, seed=c.seed)
