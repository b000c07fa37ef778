# A 0.8M-parameter GPT on Shakespeare's characters, on a CPU.  python train.py config/train_shakespeare_char_cpu.py
# First: python prepare_data.py --dataset=shakespeare_char.  Two cores: a minute, validation loss 1.61.
# The same with --optimizer=adamw --learning_rate=1e-3, nanoGPT's way: 1.90.
include('train_shakespeare_char.py')    # the data, the schedule and beta2; and for two cores:

out_dir = 'out/shakespeare_char_cpu'
eval_iters = 146                # 146 * 12 * 64 = 112,128 tokens: all of the validation split
log_interval = 50

batch_size, block_size = 12, 64
n_layer, n_head, n_embd = 4, 4, 128
dropout = 0.0

optimizer = 'muon'
learning_rate = 3e-3
max_steps = 2000                # 2000 * 12 * 64 = 1.5M tokens, 1.5 epochs
