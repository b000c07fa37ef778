# A 10.7M-parameter GPT on Shakespeare's characters, on one GPU.  python train.py config/train_shakespeare_char.py
# First: python prepare_data.py --dataset=shakespeare_char.  nanoGPT's recipe: about 3 minutes on an A100 and a
# validation loss of 1.47, its README says; not measured here.
out_dir = 'out/shakespeare_char'
dataset = 'shakespeare_char'
eval_interval = 250
eval_iters = 7                  # 7 * 64 * 256 = 114,688 tokens: all of the validation split
log_interval = 10
sample_interval = 1000

batch_size, block_size = 64, 256
total_batch_size = 0            # 64 * 256 = 16,384 tokens in each process
n_layer, n_head, n_embd = 6, 6, 384
dropout = 0.2                   # the text is seen 80 times
bias = False
mlp = 'gelu_erf'                # nanoGPT's, and on a CPU four times as fast as GPT-2's own

learning_rate, min_lr = 1e-3, 1e-4
max_steps = 5000
warmup_steps = 100
beta2 = 0.99
