# OpenAI's GPT-2 774M on our validation data and HellaSwag.  python train.py config/eval_gpt2_large.py
# All as in eval_gpt2.py. Others report HellaSwag 0.4320.
include('eval_gpt2.py')
out_dir, init_from, batch_size = 'out/eval_gpt2_large', 'gpt2-large', 4
