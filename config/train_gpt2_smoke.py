# The whole of GPT-2 124M with small batches, to try everything out.  python train.py config/train_gpt2_smoke.py
# For a laptop or a Mac: 8,192 tokens a step instead of half a million. First: python prepare_data.py
# --dataset=shakespeare, or any other data set with GPT-2's tokenizer (--dataset=...).
# Two CPU cores: 17 s a step (torch 2.13, bfloat16).
out_dir = 'out/gpt2_smoke'
dataset = 'shakespeare'
eval_interval = 250
eval_iters = 20
sample_interval = 250
sample_prompt = "Hello, I'm a language model,"

preset = 'gpt2'
batch_size, block_size = 4, 128
total_batch_size = 8192         # 4 * 128 * 16 micro-steps

learning_rate, min_lr = 6e-4, 6e-5
warmup_steps = 100
max_steps = 2000
