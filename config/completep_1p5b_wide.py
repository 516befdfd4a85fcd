# The wide 1.5B-parameter shape of arXiv:2505.01618: 32 layers x 1984 (N:L = 62), with completep_124m's hyperparameters.
# Hardware: 8 GPUs with 80 GB, --parallel=fsdp. Time: not measured. Loss: not measured. The batch size is our choice.
from completep_124m import *

out_dir = 'out/completep_1p5b_wide'
dataset = 'slimpajama'
block_size = 2048
batch_tokens = 512 * 2048
batch_size = 8

n_layer = 32
n_embd = 1984

eval_tokens = 2**22
