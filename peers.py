"""What bench.py measures against: a plain GPT script, transformers, llama.cpp.

Each contestant is a process of its own, ours too, so that no one's settings help or hinder another. It says when it is
ready, and then has a turn for every line on standard input, which it answers with what it measured, as JSON.
Nothing of ours is imported here.
"""

import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn as nn
from torch.nn import functional as F


class Block(nn.Module):

    def __init__(self, n_head: int, n_embd: int):
        super().__init__()
        self.n_head = n_head
        self.ln_1, self.ln_2 = (nn.LayerNorm(n_embd, bias=False) for _ in range(2))
        self.c_attn, self.attn_proj = nn.Linear(n_embd, 3 * n_embd, bias=False), nn.Linear(n_embd, n_embd, bias=False)
        self.c_fc, self.mlp_proj = nn.Linear(n_embd, 4 * n_embd, bias=False), nn.Linear(4 * n_embd, n_embd, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, T, C = x.shape
        q, k, v = (z.view(B, T, self.n_head, -1).transpose(1, 2) for z in self.c_attn(self.ln_1(x)).split(C, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attn_proj(y.transpose(1, 2).contiguous().view(B, T, C))
        return x + self.mlp_proj(F.gelu(self.c_fc(self.ln_2(x))))


class PlainGPT(nn.Module):
    """A GPT as the usual minimal script has it: all logits, no cache."""

    def __init__(self, block_size: int, vocab_size: int, n_layer: int, n_head: int, n_embd: int):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocab_size, n_embd), nn.Embedding(block_size, n_embd)
        self.blocks = nn.Sequential(*[Block(n_head, n_embd) for _ in range(n_layer)])
        self.ln_f, self.lm_head = nn.LayerNorm(n_embd, bias=False), nn.Linear(n_embd, vocab_size, bias=False)
        self.wte.weight = self.lm_head.weight
        for p in self.parameters():
            if p.dim() > 1:
                nn.init.normal_(p, std=0.02)

    def forward(self, idx: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        x = self.ln_f(self.blocks(self.wte(idx) + self.wpe(torch.arange(idx.size(1)))))
        if targets is None:
            return self.lm_head(x[:, -1:])
        return F.cross_entropy(self.lm_head(x).flatten(0, 1), targets.flatten(), ignore_index=-100)


def serve(turn: Callable[[], float]) -> None:
    """Take turns, the first as a warm-up, until standard input ends: turn() returns a speed, whose unit is its own."""
    turn()
    print('ready', flush=True)
    for _ in sys.stdin:
        print(json.dumps({'rate': turn(), 'gigabytes': peak_memory()}), flush=True)


def peak_memory() -> float:
    """The most memory that this process has had, in GB; 0 on Windows, which does not say."""
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == 'darwin' else 1e6)


def timed(work: Callable[[], object], amount: float) -> Callable[[], float]:
    """A turn: does work() and returns amount / seconds."""
    def turn():
        start = time.perf_counter()
        work()
        return amount / (time.perf_counter() - start)
    return turn


def run_to_its_end(command: list[str]) -> None:
    done = subprocess.run(command, text=True, capture_output=True)
    if done.returncode:
        raise SystemExit(done.stderr)


def plain_training(shape: dict, batch_size: int, steps: int) -> Callable[[], float]:
    """Tokens a second: float32, AdamW as it comes."""
    model = PlainGPT(**shape)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1)
    x, y = torch.randint(shape['vocab_size'], (2, batch_size, shape['block_size']))

    def work():
        for _ in range(steps):
            loss = model(x, y)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            loss.item()
    return timed(work, steps * x.numel())


def plain_shakespeare(folder: str) -> Callable[[], float]:
    """Times an hour that nanoGPT's recipe for a CPU reaches the loss that it ends with, near 1.8857; the tokens are
    the 16-bit numbers behind the first 1,024 bytes of `folder`'s train*.bin and val*.bin."""
    files = [next(Path(folder).glob(pattern)) for pattern in ('train*.bin', 'val*.bin')]
    train, val = (torch.from_file(str(file), size=file.stat().st_size // 2, dtype=torch.uint16)[512:].long()
                  for file in files)
    T, steps = 64, 2000

    def work():
        torch.manual_seed(1337)
        model = PlainGPT(n_layer=4, n_head=4, n_embd=128, block_size=T, vocab_size=66)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1)
        for step in range(steps):
            at = (step - 100) / (steps - 100)
            optimizer.param_groups[0]['lr'] = (1e-3 * (step + 1) / 100 if at < 0 else
                                               1e-4 + 0.45e-3 * (1 + math.cos(math.pi * at)))
            starts = torch.randint(len(train) - T, (12,)).tolist()
            x, y = (torch.stack([train[i + k:i + k + T] for i in starts]) for k in (0, 1))
            loss = model(x, y)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            x, y = (val[k:len(val) - T + k][:(len(val) - T) // T * T].view(-1, T).split(64) for k in (0, 1))
            losses = [model(a, b) for a, b in zip(x, y, strict=True)]
        print(f'validation loss: {sum(losses) / len(losses):.4f}', file=sys.stderr)
    return timed(work, 3600)


def plain_hellaswag(shape: dict, questions: list) -> Callable[[], float]:
    """Questions a second, one ending a pass. questions: [(tokens of the context, [tokens of each ending])]."""
    model = PlainGPT(**shape).eval()

    def work():
        with torch.no_grad():
            for context, endings in questions:
                for ending in endings:
                    model(torch.tensor([context + ending[:-1]]),
                          torch.tensor([[-100] * (len(context) - 1) + ending])).item()
    return timed(work, len(questions))


# build-nanogpt's way, which took documents out of a downloaded data set, 16 at a time
PLAIN_TOKENIZING = '''
import json, multiprocessing, sys
import numpy as np, tiktoken

encoding = tiktoken.get_encoding('gpt2')

def tokenize(line):
    tokens = np.array([encoding.eot_token] + encoding.encode_ordinary(json.loads(line)['text']))
    assert (0 <= tokens).all() and (tokens < 2 ** 16).all()
    return tokens.astype(np.uint16)

if __name__ == '__main__':
    path, out, workers, at_a_time = sys.argv[1:]
    shard, count = np.empty(100_000_000, dtype=np.uint16), 0
    with multiprocessing.Pool(int(workers)) as pool, open(path, encoding='utf-8') as lines:
        for tokens in pool.imap(tokenize, lines, chunksize=int(at_a_time)):
            shard[count:count + len(tokens)] = tokens
            count += len(tokens)
    np.save(out, shard[:count])
'''


def plain_tokenizing(path: str, workers: int, at_a_time: int) -> Callable[[], float]:
    """Megabytes a second from a .jsonl file to a shard on disk, by a pool that is given `at_a_time` documents."""
    folder = tempfile.TemporaryDirectory()
    script = Path(folder.name, 'tokenize_plainly.py')
    script.write_text(PLAIN_TOKENIZING, encoding='utf-8')

    def work():             # which keeps the folder
        run_to_its_end([sys.executable, str(script), path, f'{folder.name}/made.npy', str(workers), str(at_a_time)])
    return timed(work, Path(path).stat().st_size / 1e6)


def transformers_decoding(shape: dict, n_prompts: int, prompt_tokens: int, new_tokens: int,
                          dtype: str) -> Callable[[], float]:
    """Tokens a second of greedy decoding with transformers' GPT-2."""
    from transformers import GPT2Config, GPT2LMHeadModel
    model = GPT2LMHeadModel(GPT2Config(
        vocab_size=shape['vocab_size'], n_positions=shape['block_size'], n_layer=shape['n_layer'],
        n_head=shape['n_head'], n_embd=shape['n_embd'])).eval().to(getattr(torch, dtype))
    idx = torch.randint(shape['vocab_size'], (n_prompts, prompt_tokens))
    return timed(lambda: model.generate(idx, attention_mask=torch.ones_like(idx), do_sample=False, pad_token_id=0,
                                        max_new_tokens=new_tokens, min_new_tokens=new_tokens),
                 n_prompts * new_tokens)


def llama_cpp_decoding(gguf: str, prompt_tokens: int, new_tokens: int, threads: int) -> Callable[[], float]:
    """Tokens a second of greedy decoding with llama.cpp (ik-llama-cpp-python) and the weights of a GGUF file."""
    from ik_llama_cpp import IkLlama
    model = IkLlama(model_path=gguf, n_threads=threads, n_ctx=512, verbose=False)
    ids = list(range(100, 100 + prompt_tokens))
    made = []
    turn = timed(lambda: made.append(len(model.generate(ids, max_tokens=new_tokens, temperature=0.0))), 1)
    return lambda: turn() * made[-1]


if __name__ == '__main__':
    kind, arguments = sys.argv[1:]
    serve(globals()[kind](**json.loads(arguments)))
