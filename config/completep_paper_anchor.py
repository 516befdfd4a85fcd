# The runs in Figs. 2 and 3 of CompleteP (arXiv:2505.01618); choose the depth with --n_layer=64.
# Data: python data/slimpajama/prepare.py
# Hardware: a GPU of 80 GB. Time and loss: not measured.
out_dir = 'out/completep_paper_anchor'
dataset = 'slimpajama'
vocab_size = 50257
block_size = 2048
batch_tokens = 128 * 2048
batch_size = 16
max_iters = 1144
n_layer = base_n_layer = 2
n_embd = base_n_embd = 256
head_dim = base_head_dim = 64
pos = 'alibi'
activation = 'relu2'
attn_scale = '1/N'
parameterization = 'completep'
init_std = 0.02
learning_rate = 2**-8
eps = 1e-16
weight_decay = 0.0
warmup_frac = 0.1
schedule = 'linear'
