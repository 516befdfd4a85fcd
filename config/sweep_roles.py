# What a search of the learning rates of the roles finds at the base, with its init; a role's decay follows its rate.
# Hardware: any CPU. Time: 128 runs of evidence_base.py, 10 seconds each on one core.
# python sweep.py --tune config/sweep_roles.py --trials=128 --init_std=0.08 --input_mult=1 --attn_mult=1 \
#     --output_mult=1 --out_dir=out/sweep_roles
from evidence_base import *

parameterization = 'completep'
learning_rate = [2.0**-10, 2.0**-3]
lr_mult = {'embedding': [0.0625, 16.0], 'unembedding': [0.0625, 16.0], 'hidden_weight+residual_proj': [0.25, 4.0],
           'block_norm+final_norm': [0.0625, 16.0]}
seed = 1
