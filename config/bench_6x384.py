# A shape for bench.py: 6 layers x 384, with tied weights and without biases, like nanoGPT.
# Hardware: any CPU. Data: tiny Shakespeare by characters, as in nanoGPT: python data/shakespeare_char/prepare.py
dataset = 'shakespeare_char'
n_layer = 6
n_embd = 384
block_size = 256
batch_tokens = 8 * 256
vocab_size = 0
bias = False
tie_weights = True
