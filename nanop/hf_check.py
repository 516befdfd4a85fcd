"""
What transformers makes of an exported folder, in a process that never sees nanoP's model (export_hf.py starts it).

    python -m nanop.hf_check FOLDER EXPECTED float32

EXPECTED is a safetensors file of what nanoP computed: `sequences` (N, T + 1) of validation text, `logits` (B, T, V) of
the first B, `prompt` (1, P) and `greedy`, the tokens that follow it. With `auto` instead of float32 the model computes
in the dtype of its weights. The last line of the output is JSON.
"""
import json
import logging
import math
import sys

import torch
from safetensors.torch import load_file
from torch.nn import functional as F

LOGITS = 2**25  # the most that are computed at once


@torch.no_grad()
def mean_loss(logits_of, sequences):
    """The mean loss, in nats per token, of `sequences` (N, T + 1) under ids (B, T) -> logits (B, T, V)."""
    total, vocab_size = 0.0, logits_of(sequences[:1, :1]).size(-1)
    batch_size = max(1, LOGITS // (sequences.size(1) * vocab_size))
    for batch in sequences.split(batch_size):
        logits = logits_of(batch[:, :-1]).float()
        total += F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction='sum').double().item()
    return total / sequences[:, 1:].numel()


def largest_difference(logits, expected):
    """The largest difference between logits (B, T, V), relative to the largest logit; infinity if one is not finite."""
    difference = ((logits - expected).abs().max() / expected.abs().max()).item()
    return difference if math.isfinite(difference) else math.inf


def greedy_gap(model, prompt, greedy):
    """How much likelier than nanoP's `greedy` tokens the model's own are, where they part, in logits relative to the
    largest; 0 if they never do. The model keeps its cache, and goes past an end of text."""
    if not len(greedy):  # a context of one token
        return 0.0
    model.generation_config.eos_token_id = None
    out = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=len(greedy), do_sample=False,
                         use_cache=True, output_logits=True, return_dict_in_generate=True)
    found = out.sequences[0, prompt.size(1):]
    for (logits,), own, ours in zip(out.logits, found.tolist(), greedy.tolist(), strict=True):
        if own != ours:
            return ((logits[own] - logits[ours]) / logits.abs().max()).item()
    return 0.0


@torch.no_grad()
def findings(folder, path, dtype):
    """What main() prints: loss, difference and greedy_gap, where the shape is right; `loaded`, what did not fit."""
    from transformers import AutoModelForCausalLM
    model, loaded = AutoModelForCausalLM.from_pretrained(  # our own modeling file may be in the folder
        folder, dtype=dtype, local_files_only=True, output_loading_info=True, trust_remote_code=True)
    model.eval()
    expected = load_file(path)

    def logits_of(ids):
        return model(ids).logits
    own = logits_of(expected['sequences'][:len(expected['logits']), :-1]).float()
    found = dict(loaded={key: sorted(map(str, names)) for key, names in loaded.items() if names},
                 architecture=type(model).__name__, vocab_size=own.size(-1))
    if own.shape == expected['logits'].shape:
        found.update(difference=largest_difference(own, expected['logits']),
                     loss=mean_loss(logits_of, expected['sequences']),
                     greedy_gap=greedy_gap(model, expected['prompt'], expected['greedy']))
    return found


def main(folder, path, dtype):
    logging.disable(logging.WARNING)
    found = findings(folder, path, dtype)
    assert 'model' not in sys.modules, "nanoP's model was imported"
    print('\n' + json.dumps(found))


if __name__ == '__main__':
    main(*sys.argv[1:])
