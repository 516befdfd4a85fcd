# The best of 16 points: validation loss 1.9405 at this shape.
# Train it larger with the same values: python train.py results/tune_direct/best.py --n_layer=.. --n_embd=..
dataset = 'wikitext-2'
block_size = 64
batch_tokens = 4096
batch_size = 64
max_iters = 250
n_layer = 16
n_embd = 64
head_dim = 16
base_n_layer = 2
base_n_embd = 32
base_head_dim = 16
init_std = 0.02595
input_mult = 3.761
attn_mult = 3.792
output_mult = 3.597
learning_rate = 0.01861
eval_tokens = 131072
compile = False
out_dir = 'results/tune_direct/best'
