# A GPT-2 that answers, in several turns: tuned on your own conversations.  python train.py config/finetune_chat.py
# First, from lines such as {"messages": [{"role": "user", "content": "Hi!"}, {"role": "assistant", "content": "Hi."}]}:
#   python prepare_data.py --dataset=custom --input=my_chats.jsonl --tokenizer=gpt2 --out=data/chats
# (--tokenizer=FOLDER/tokenizer.json and --init_from=FOLDER for a Llama-class model instead.) Only answers are learned,
# and that they end. 300 steps of 16,384 tokens: two minutes on a GPU, some hours on two CPU cores (estimates).
# Then: python sample.py --interactive --out_dir=out/chat
out_dir = 'out/chat'
init_from = 'gpt2'              # or an out_dir of your own
dataset = 'chats'
eval_interval = 50
eval_iters = 20
log_interval = 10

batch_size, block_size = 4, 1024
total_batch_size = 16384        # 4 * 1024 tokens * 4 micro-steps
isolate_documents = True        # a conversation does not see its neighbours in a window
dropout = 0.1

learning_rate, min_lr = 5e-5, 0.0
warmup_steps = 10
max_steps = 300                 # two or three times through 2,000 conversations; stop where the validation loss rises
