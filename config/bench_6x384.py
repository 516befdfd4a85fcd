# A shape for bench.py: 6 layers x 384, 8 x 256 tokens a step, with the tied weights and without the biases of nanoGPT.
dataset = 'shakespeare_char'
n_layer = 6
n_embd = 384
block_size = 256
batch_tokens = 8 * 256
vocab_size = 0
bias = False
tie_weights = True
