# Which positions and activation leave the least noise between seeds, and at which width? The base of the evidence:
# python sweep.py config/sweep_setting.py, with the data of sweep_base.py
# Hardware: any CPU. Time: half an hour on 2 cores.
from sweep_base import *

out_dir = 'out/sweep_setting'
parameterization = 'completep'
n_layer = 4
shapes = [dict(n_embd=32, base_n_embd=32), dict(n_embd=64, base_n_embd=64)]
variants = [dict(pos='learned', activation='gelu'), dict(pos='alibi', activation='relu2'),
            dict(pos='rope', activation='relu2'), dict(pos='alibi', activation='gelu'),
            dict(pos='rope', activation='gelu')]
learning_rate = [2.0**-7, 2.0**-6, 2.0**-5]
seed = [1, 2, 3]
