# A 0.9M-parameter GPT on Shakespeare's characters, on a CPU.  python train.py config/train_shakespeare_char_cpu.py
# First: python prepare_data.py --dataset=shakespeare_char.  Two cores: a minute, validation loss 1.57. nanoGPT's recipe
# for a CPU ends at 1.89 after as long, which this reaches in ten seconds with --max_steps=185.
include('train_shakespeare_char.py')    # the data and beta2; and for two cores:

out_dir = 'out/shakespeare_char_cpu'
eval_iters = 73                 # 73 * 24 * 64 = 112,128 tokens: all of the validation split
log_interval = 50

batch_size, block_size = 24, 64
n_layer, n_head, n_embd = 3, 5, 160     # wide and shallow: few operations, which are what takes the time
dropout = 0.0
position = 'rope'
qk_norm = True

optimizer = 'muon'
learning_rate, min_lr = 1.2e-2, 0.0
warmup_steps = 10
max_steps = 1100                # 1100 * 24 * 64 = 1.7M tokens, 1.7 epochs
