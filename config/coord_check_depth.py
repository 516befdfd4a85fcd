# the depth grid of the code of CompleteP (arXiv:2505.01618, Fig. 7): python coord_check.py config/coord_check_depth.py
# Hardware: any CPU. Time on 2 cores: 1 minute for each seed of the depths to 16, without a control; more was not run.
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
input_mult = 50.0  # embeddings of size 1, see coord_check.py
eps = 1e-12
dtype = 'bfloat16'
