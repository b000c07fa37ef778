# OpenAI's GPT-2 355M on our validation data and HellaSwag.  python train.py config/eval_gpt2_medium.py
# All as in eval_gpt2.py. Others report HellaSwag 0.3752.
include('eval_gpt2.py')
out_dir, init_from, batch_size = 'out/eval_gpt2_medium', 'gpt2-medium', 8
