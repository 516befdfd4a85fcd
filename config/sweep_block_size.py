# Learning rate against sequence length at fixed tokens per step (Tensor Programs V, arXiv:2203.03466):
# python sweep.py config/sweep_block_size.py; for a second width add --n_embd=128 --out_dir=out/sweep_block_size_128
# Hardware: any CPU. Time: 3 minutes on 2 cores, 9 for the second width.
from sweep_base import *

out_dir = 'out/sweep_block_size'
parameterization = 'mup'
shapes = [dict(block_size=size) for size in (16, 32, 64, 128, 256)]
learning_rate = [2.0**k for k in range(-9, -3)]
seed = 1
