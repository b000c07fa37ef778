# A Chinese GPT that answers questions, from nothing, on an ordinary CPU.  python train.py config/train_zh.py
# First: python prepare_zh.py.  Two cores: 6 minutes, half a minute of it to compile; then (two seeds) 99% of 1,841
# questions that it has never seen are answered right, in forms of asking that it has never seen 95 to 96%, and 88% of
# what it never learned is declined.
dataset = 'zh'
out_dir = 'out/zh'
eval_interval = 680
eval_iters = 20
zh_eval_interval = 1360         # at the end: before it knows when to stop, an answer takes long
log_interval = 20

n_layer, n_head, n_embd = 4, 4, 256
norm, position, mlp, bias = 'rmsnorm', 'rope', 'swiglu', False      # a small Llama, which others can run, too
batch_size, block_size = 26, 160
total_batch_size = 0            # 26 * 160 = 4,160 tokens: some 90 questions with their answers
dropout = 0.0
isolate_documents = True        # or a question's neighbours in its window would help to answer it

optimizer = 'muon'
learning_rate, min_lr = 8e-3, 1e-4
weight_decay = 0.0              # each question is seen but once or twice
warmup_steps = 30
max_steps = 1360                # 1,360 * 4,160 = 5.7M tokens: each question is seen 1.3 times, each fact fifty
