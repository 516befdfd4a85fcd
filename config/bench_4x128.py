# A shape for bench.py: 4 layers x 128, with tied weights and without biases, like nanoGPT.
# Hardware: any CPU. Data: tiny Shakespeare by characters, as in nanoGPT: python data/shakespeare_char/prepare.py
dataset = 'shakespeare_char'
n_layer = 4
n_embd = 128
block_size = 256
batch_tokens = 16 * 256
vocab_size = 0
bias = False
tie_weights = True
