# Does what sweep_roles.py and sweep_roles_global.py found stay good? The best of each at the base and at two targets.
# Hardware: any CPU. Time: not measured. Once with each best.py, here with that of sweep_roles.py:
# python sweep.py config/sweep_roles_transfer.py out/sweep_roles/best.py --out_dir=out/sweep_roles_transfer
from evidence_base import *

shapes = [dict(n_layer=2, n_embd=32), dict(n_layer=16, n_embd=64), dict(n_layer=4, n_embd=256)]
seed = [1, 2, 3]
