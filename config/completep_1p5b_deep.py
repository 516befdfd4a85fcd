# The deep 1.5B-parameter shape of arXiv:2505.01618: 179 layers x 832 (N:L = 5). The rest is as in completep_1p5b_wide.
# Hardware: 8 GPUs with 80 GB, --parallel=fsdp. Time: not measured. Loss: not measured.
from completep_1p5b_wide import *

out_dir = 'out/completep_1p5b_deep'
batch_size = 4  # fits without recompute; between machines, --recompute=True --batch_size=8 sends half as much
n_layer = 179
n_embd = 832
