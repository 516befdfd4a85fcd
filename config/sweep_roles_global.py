# What a search of the global learning rate and init alone finds at the base, to compare with sweep_roles.py:
# python sweep.py --tune config/sweep_roles_global.py --input_mult=1 --attn_mult=1 --output_mult=1 \
#     --trials=64 --out_dir=out/sweep_roles_global
# Hardware: any CPU. Time: 64 runs of evidence_base.py, 10 seconds each on one core.
from evidence_base import *

parameterization = 'completep'
learning_rate = [2.0**-10, 2.0**-3]
init_std = [0.025, 0.4]
seed = 1
