# GPT-2's 124M shape, 12 layers x 768, untied (163M parameters), with the base hyperparameters of the paper.
# Hardware: one GPU with 40 GB or more, or several under torchrun. Time: not measured. Loss: not measured.
out_dir = 'out/completep_124m'
dataset = 'fineweb'
block_size = 1024
batch_tokens = 512 * 1024
batch_size = 16
tokens_per_param = 20.0

n_layer = 12
n_embd = 768

# base hyperparameters, tuned by the paper at 2 layers x 256; its tau_ema sets the weight decay
learning_rate = 2**-8
init_std = 0.02
eps = 1e-16
tau_ema = 0.1407

eval_interval = 500
eval_tokens = 2**21
