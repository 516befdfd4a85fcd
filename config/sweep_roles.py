# What a search of learning rates per role finds at the base, at the base's init:
# python sweep.py --tune config/sweep_roles.py --init_std=0.08 --input_mult=1 --attn_mult=1 --output_mult=1 \
#     --trials=128 --out_dir=out/sweep_roles
# Hardware: any CPU. Time: 128 runs of evidence_base.py, 10 seconds each on one core.
from evidence_base import *

parameterization = 'completep'
learning_rate = [2.0**-10, 2.0**-3]
lr_mult = {'embedding': [0.0625, 16.0], 'unembedding': [0.0625, 16.0], 'hidden_weight+residual_proj': [0.25, 4.0],
           'block_norm+final_norm': [0.0625, 16.0]}
seed = 1
