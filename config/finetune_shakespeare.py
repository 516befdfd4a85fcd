# Fine-tunes GPT-2 XL on tiny Shakespeare, as nanoGPT does; --init_from=gpt2 takes the small one. Needs transformers.
# Hardware: one GPU with 40 GB. Time: not measured. Loss: not measured.
out_dir = 'out/shakespeare'
init_from = 'gpt2-xl'
parameterization = 'gpt2'
dataset = 'shakespeare'
block_size = 1024
batch_size = 1
batch_tokens = 32 * 1024
max_iters = 20

learning_rate = 3e-5
weight_decay = 0.1
schedule = 'constant'
warmup_frac = 0.0

eval_interval = 5
eval_tokens = 35 * 1024
always_save_checkpoint = False
