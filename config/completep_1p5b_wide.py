# The wide 1.5B-parameter shape of arXiv:2505.01618, N=1984, L=32 (N:L = 62), 20 tokens per parameter.
# Hardware: 8 GPUs with 80 GB. Time: not measured. Loss: not measured. The batch size is our choice.
out_dir = 'out/completep_1p5b_wide'
dataset = 'slimpajama'
block_size = 2048
batch_tokens = 512 * 2048
batch_size = 8
tokens_per_param = 20.0

n_layer = 32
n_embd = 1984
head_dim = 64

# base hyperparameters: learning rate, init and eps from the paper's anchor (2 layers x 256), decay by its tau_ema
learning_rate = 2**-8
init_std = 0.02
eps = 1e-16
tau_ema = 0.1407

eval_interval = 500
eval_tokens = 2**22
