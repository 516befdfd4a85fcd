# The depth grid of the CompleteP code (arXiv:2505.01618, Fig. 7): python coord_check.py config/coord_check_depth.py
# Hardware: any CPU. Time on 2 cores: 1 minute per seed for depths up to 16, without a control. The rest was not run.
parameterization = 'completep'
axes = 'depth'
out_dir = 'out/coord_check_depth'
depths = '2,4,8,16,32,64'
n_embd = 256
head_dim = 64
dataset = 'shakespeare_char'
block_size = 1024
batch_tokens = 8 * 1024
batch_size = 4
probe_tokens = 128
learning_rate = 1e-3
init_std = 0.02
input_mult = 50.0  # 1 / init_std: embeddings of size 1
eps = 1e-12
dtype = 'bfloat16'
