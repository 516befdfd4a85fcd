# nanoGPT's GPT-2 (124M) on OpenWebText with nanoGPT's parameterization, to compare with it.
# Hardware: 8 A100 40GB. Time and loss according to nanoGPT: about 4 days, about 2.85. Here: not measured.
#   torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py
out_dir = 'out/gpt2'
parameterization = 'gpt2'
dataset = 'openwebtext'
block_size = 1024
batch_size = 12
batch_tokens = 12 * 1024 * 5 * 8
max_iters = 600_000

n_layer = 12
n_embd = 768
bias = False
tie_weights = True

learning_rate = 6e-4
weight_decay = 0.1
beta2 = 0.95
warmup_frac = 2000 / 600_000
schedule = 'cosine'
final_lr_frac = 0.1

eval_interval = 1000
eval_tokens = 200 * 12 * 1024
