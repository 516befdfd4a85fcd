# Two more seeds for the variants of sweep_ablations.py whose best learning rate moved, or that lost, with one seed:
# python sweep.py config/sweep_ablations_seeds.py, with the data of sweep_base.py
# Hardware: any CPU. Time: half an hour on 2 cores.
from sweep_ablations import *

out_dir = 'out/sweep_ablations_seeds'
seed = [2, 3]
variants = [
    dict(), dict(activation='relu2'), dict(pos='alibi'), dict(n_kv_head=1), dict(tie_weights=True),
    dict(attn_scale='1/d'), dict(weight_decay=0.3),
]
