# ALiBi over width, three seeds, with slopes that keep their range for the base's two heads:
# python sweep.py config/sweep_ablations_alibi.py, with the data of sweep_base.py
# Hardware: any CPU. Time: ten minutes on 2 cores.
from sweep_ablations import *

out_dir = 'out/sweep_ablations_alibi'
seed = [1, 2, 3]
variants = [dict(pos='alibi')]
