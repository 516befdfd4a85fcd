# What a search of the global learning rate and init alone finds at the base, to compare with sweep_roles.py.
# Hardware: any CPU. Time: 64 runs of evidence_base.py, 10 seconds each on one core.
# python sweep.py --tune config/sweep_roles_global.py --trials=64 --input_mult=1 --attn_mult=1 --output_mult=1 \
#     --out_dir=out/sweep_roles_global
from evidence_base import *

parameterization = 'completep'
learning_rate = [2.0**-10, 2.0**-3]
init_std = [0.02, 0.32]
seed = 1
