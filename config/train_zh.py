# A Chinese GPT that answers questions, from nothing, on an ordinary CPU.  python train.py config/train_zh.py
# First: python prepare_zh.py.  Two cores: 2 minutes; then 99.6% of 530 questions that it has never seen are answered
# right, in forms of asking that it has never seen 96%, and 96% of what it never learned is declined.
dataset = 'zh'
out_dir = 'out/zh'
eval_interval = 160
eval_iters = 10
zh_eval_interval = 160
log_interval = 20

preset = 'teaching'             # 4 layers, 4 heads, 256 wide, rmsnorm, rope, silu
batch_size, block_size = 32, 128
total_batch_size = 0            # 32 * 128 = 4,096 tokens: some 80 questions with their answers
dropout = 0.0
isolate_documents = True        # or a question's neighbours in its window would help to answer it

optimizer = 'muon'
learning_rate, min_lr = 8e-3, 1e-4
warmup_steps = 30
max_steps = 480                 # each question is seen about three times
