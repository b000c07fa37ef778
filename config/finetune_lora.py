# The same by adapters: OpenAI's GPT-2 124M as it is, and 0.95% beside it.  python train.py config/finetune_lora.py
# 16 * 8 * 768 * 12 = 1,179,648 parameters are trained; AdamW's state takes 9 MB instead of 1 GB. With 512 tokens on one
# CPU thread, a step takes 0.7 of the time and 0.6 of the memory; what the texts are worth has not been measured here.
# Then: python sample.py --init_from=out/shakespeare_lora --prompt="ROMEO:"
include('finetune_shakespeare.py')      # all of it, but for:

out_dir = 'out/shakespeare_lora'
lora_rank, lora_alpha = 8, 16
learning_rate, min_lr = 3e-4, 3e-4      # ten times as much as for all weights, as is usual
weight_decay = 0.0
