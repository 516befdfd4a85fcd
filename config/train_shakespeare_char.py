# nanoGPT's small character model on tiny Shakespeare with nanoGPT's parameterization.
# Hardware: one GPU. According to nanoGPT: best validation loss 1.4697, 3 minutes on an A100. Here: not measured.
out_dir = 'out/shakespeare_char'
parameterization = 'gpt2'
dataset = 'shakespeare_char'
block_size = 256
batch_size = 64
batch_tokens = 64 * 256
max_iters = 5000

n_layer = 6
n_embd = 384
head_dim = 64
dropout = 0.2
bias = False
tie_weights = True

learning_rate = 1e-3
weight_decay = 0.1
beta2 = 0.99
warmup_frac = 0.02
schedule = 'cosine'
final_lr_frac = 0.1

eval_interval = 250
eval_tokens = 111_360
always_save_checkpoint = False  # it overfits: keep the best checkpoint
