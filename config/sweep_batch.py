# Learning rate against batch size at a fixed number of steps (Tensor Programs V, arXiv:2203.03466):
# python sweep.py config/sweep_batch.py; for a second width add --n_embd=128 --out_dir=out/sweep_batch_128
# Hardware: any CPU. Time: 4 minutes on 2 cores, 11 for the second width.
from sweep_base import *

out_dir = 'out/sweep_batch'
parameterization = 'mup'
shapes = [dict(batch_tokens=tokens) for tokens in (1024, 2048, 4096, 8192)]
learning_rate = [2.0**k for k in range(-9, -3)]
seed = 1
