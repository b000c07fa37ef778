# OpenAI's GPT-2 124M, tuned to write like Shakespeare.  python train.py config/finetune_shakespeare.py
# First: python prepare_data.py --dataset=shakespeare.  Downloads the weights once, through HF_ENDPOINT if that is set.
# 20 steps of 32,768 tokens: about two passes over the play scripts. On two CPU cores an hour or so, on a GPU a minute
# (estimates). Then: python sample.py --init_from=out/shakespeare_gpt2 --prompt="ROMEO:"
out_dir = 'out/shakespeare_gpt2'
init_from = 'gpt2'              # gpt2-xl does it better, on a GPU
dataset = 'shakespeare'
eval_interval = 5
eval_iters = 33                 # all of the validation split
sample_interval = 20
sample_prompt = 'ROMEO:'

batch_size, block_size = 1, 1024
total_batch_size = 32768        # 1 * 1024 tokens * 32 micro-steps
dropout = 0.1                   # the text is small

learning_rate, min_lr = 3e-5, 3e-5
warmup_steps = 0
max_steps = 20
