# The validation loss of OpenAI's GPT-2 (124M) on OpenWebText; --init_from=gpt2-medium, .. evaluates the larger ones.
# Needs pip install transformers.
# Hardware: one GPU. Time: not measured. Loss according to nanoGPT: 3.12. Here: not measured.
out_dir = 'out/eval_gpt2'
init_from = 'gpt2'
parameterization = 'gpt2'
dataset = 'openwebtext'
block_size = 1024
batch_size = 8
batch_tokens = 64 * 1024
eval_only = True
eval_tokens = 500 * 8 * 1024
