# GPT-2 124M on FineWeb-Edu, 10B tokens.  torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py
# First: python fineweb.py  (or python fineweb.py --pretokenized, which only downloads).
# 8 x H100: about 45 minutes at 40% MFU (an estimate: python bench.py --costs); one H100: 6 hours. Others report
# validation loss 3.0771 and HellaSwag 0.2966 after 7.3B tokens, HellaSwag 0.339 after 40B; OpenAI's own weights have
# 3.2924 and 0.2955 (config/eval_gpt2.py).
out_dir = 'out/gpt2'
dataset = 'fineweb_edu_10B'
eval_interval = 250
eval_iters = 160                # 160 * 64 * 1024 = 10.5M tokens, divided over the processes
hellaswag_interval = 250
checkpoint_interval = 5000
sample_interval = 250
sample_prompt = "Hello, I'm a language model,"
num_samples = 4

preset = 'gpt2'
batch_size, block_size = 64, 1024
total_batch_size = 524288       # 64 * 1024 tokens * 8 processes * 1 micro-step

learning_rate, min_lr = 6e-4, 6e-5
weight_decay = 0.1
warmup_steps = 715              # 715 * 524,288 = 375M tokens, as GPT-3
max_steps = 19073               # 19,073 * 524,288 = 10 billion tokens
