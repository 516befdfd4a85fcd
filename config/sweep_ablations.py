# Which changes keep the best learning rate where it is over width (arXiv:2404.05728):
# python sweep.py config/sweep_ablations.py, with the data of sweep_base.py
# Hardware: any CPU. Time: an hour on 2 cores.
from sweep_base import *

out_dir = 'out/sweep_ablations'
parameterization = 'mup'
n_embd = [32, 128]
learning_rate = [2.0**k for k in range(-8, -3)]
seed = 1
variants = [
    dict(), dict(norm='rmsnorm'), dict(norm='rmsnorm', norm_gain=False), dict(norm_gain=False), dict(qk_norm=True),
    dict(bias=False), dict(activation='relu'), dict(activation='relu2'), dict(activation='swiglu'),
    dict(pos='rope'), dict(pos='alibi'), dict(pos='none'), dict(n_kv_head=1), dict(tie_weights=True),
    dict(attn_scale='1/d'), dict(attn_scale='1/N'), dict(zero_init_query=True), dict(zero_init_unembed=True),
    dict(parameterization='sp'), dict(schedule='cosine'),
    dict(weight_decay=0.3), dict(weight_decay=0.003, weight_decay_mode='independent'),
    dict(batch_tokens=256 * 64, batch_size=256, max_iters=62),
    dict(batch_tokens=16 * 64, batch_size=16, max_iters=1000),
    dict(optimizer='muon'),
]
