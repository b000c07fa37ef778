# A small GPT on Chinese text, such as poems.  python train.py config/train_zh_lm.py
# Two cores: 5.5 minutes for 12,000 Tang poems, perplexity 82, lines of five characters.
# First: python prepare_zh.py --input=poems.jsonl --out=data/tang, with a {"text": "..."} on each line.
dataset = 'tang'
out_dir = 'out/zh_lm'
eval_interval = 200
eval_iters = 40
log_interval = 50
sample_interval = 500
sample_prompt = ''

preset = 'teaching'
batch_size, block_size = 32, 128
total_batch_size = 0            # 32 * 128 = 4,096 tokens
dropout = 0.1
qk_norm = True
zero_init = True

optimizer = 'muon'
learning_rate, min_lr = 6e-3, 0.0
weight_decay = 1.0              # ten times the usual: the poems are seen more than three times
warmup_steps = 50
max_steps = 700
