# The first run: 8 layers x 128 on the source text of Python's standard library, hyperparameters of a base of 2 x 256.
# Hardware: any CPU. Time: 3 minutes on 2 cores. Loss to expect: 1.27 nats per byte, 1.83 bits per byte.
out_dir = 'out/completep_small'
dataset = 'stdlib'
block_size = 64  # with learned positions a short context learns fastest at this budget
batch_tokens = 32 * 64
batch_size = 32
max_iters = 1200

n_layer = 8
n_embd = 128

# base hyperparameters, for 2 layers x 256
learning_rate = 2e-3
init_std = 0.05

eval_interval = 200
eval_tokens = 65536
sample_tokens = 300
compile = False  # on a run this short, compiling costs more time than it saves
