# The validation loss of OpenAI's GPT-2 (124M) on OpenWebText; --init_from=gpt2-medium, .. for the others.
# Needs transformers.
# Hardware: one GPU. Loss documented by nanoGPT: 3.12 (3.11 on its training part); here: not measured.
out_dir = 'out/eval_gpt2'
init_from = 'gpt2'
dataset = 'openwebtext'
block_size = 1024
batch_size = 8
batch_tokens = 8 * 1024
eval_only = True
eval_tokens = 500 * 8 * 1024
