# The classic recipe for a small Chinese GPT, to the letter, for comparison.  python train.py config/train_zh_classic.py
# First: python prepare_zh.py --vocab_size=824 --single_han=true --out=data/zh_classic.  AdamW, 2000 steps of 16 rows;
# with a vocabulary of 824 its 3,368,192 parameters: 824 * 256 + 4 * (12 * 256 * 256 + 11 * 256) + 256.
dataset = 'zh_classic'
out_dir = 'out/zh_classic'
eval_interval = 500
eval_iters = 50
zh_eval_interval = 500
log_interval = 100

preset = 'teaching'             # 4 layers, 4 heads, 256 wide, rmsnorm, rope, silu
batch_size, block_size = 16, 128
total_batch_size = 0            # 16 * 128 = 2,048 tokens
dropout = 0.0

learning_rate, min_lr = 3e-4, 3e-5
warmup_steps = 100
max_steps = 2000
