# A 0.8M-parameter GPT on Shakespeare's characters, on a CPU.  python train.py config/train_shakespeare_char_cpu.py
# First: python prepare_data.py --dataset=shakespeare_char.  Two cores: a minute, validation loss 1.61.
# The same with --optimizer=adamw --learning_rate=1e-3, nanoGPT's way: 1.90.
out_dir = 'out/shakespeare_char_cpu'
dataset = 'shakespeare_char'
eval_interval = 250
eval_iters = 146                # 146 * 12 * 64 = 112,128 tokens: all of the validation split
log_interval = 50
sample_interval = 1000

batch_size, block_size = 12, 64
total_batch_size = 0            # 12 * 64 = 768 tokens
n_layer, n_head, n_embd = 4, 4, 128
bias = False

optimizer = 'muon'
learning_rate, min_lr = 3e-3, 1e-4
max_steps = 2000                # 2000 * 768 = 1.5M tokens, 1.5 epochs
warmup_steps = 100
beta2 = 0.99                    # steady, because a batch has so few tokens
