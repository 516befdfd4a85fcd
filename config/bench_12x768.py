# A shape for bench.py: 12 layers x 768, 2 x 512 tokens a step, with the tied weights and without the biases of nanoGPT.
dataset = 'wikitext-2-gpt2'
n_layer = 12
n_embd = 768
block_size = 512
batch_tokens = 2 * 512
vocab_size = 50304
bias = False
tie_weights = True
