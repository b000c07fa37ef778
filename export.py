"""A checkpoint -> a form for use elsewhere.

    python export.py --init_from=out/zh --format=int8
    python export.py --init_from=out/gpt2 --format=hf --out=my-gpt2 [--push=user/name]
    python export.py --init_from=out/gpt2 --format=gguf [--gguf_type=f16]
    python export.py --init_from=out/shakespeare_lora --format=lora

int8: a checkpoint about a quarter as large, which sample.py and eval_zh.py load as any other and which decodes faster
on a CPU. It holds weights only, each matrix as int8 with a scale for every row, and cannot be trained further.
hf: a folder that `transformers` loads with no code of ours: GPT-2 shapes as GPT2LMHeadModel, Llama-class shapes as
LlamaForCausalLM, with the tokenizer and a model card. The way back: --init_from=FOLDER.
gguf: a file with all of it, of the same shapes, that llama.cpp, Ollama and what else is built on them run and serve.
lora: a folder with the adapters that train.py made with --lora_rank, a few megabytes, which `peft` puts beside the
weights they were trained with: PeftModel.from_pretrained(base, FOLDER). In the other formats they are part of these.
"""

import json
import os
import re
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from configurator import UserError, configure, first_line      # first: from here on, Ctrl-C is quiet

import torch

from checkpoint import build_model, pick_checkpoint, tokenizer_of
from dataset import ASKED
from download import offline
from files import write_atomically
from huggingface import (GPT2_NAMES, Unsupported, export_tensors, family_of, is_published, save_adapters, save_folder,
                         tokenizer_files)
from layers import to_int8
from model import GPT
from tokenizer import AnyTokenizer

# -----------------------------------------------------------------------------
init_from = 'auto'          # a checkpoint, a published model, or a folder; auto = out_dir, or the newest run in it
out_dir = 'out'             # where runs are
format = 'int8'             # int8, hf, gguf or lora
gguf_type = 'q8_0'          # for gguf, what its matrices are kept in: f32, f16 or q8_0
out = ''                    # what to write; '' = int8.pt, q8_0.gguf, or the folder hf or lora, beside the checkpoint
push = ''                   # for hf: upload the folder to this user/name on the Hugging Face hub, too
config = configure(globals(), one_of={'format': ('int8', 'hf', 'gguf', 'lora'), 'gguf_type': ('f32', 'f16', 'q8_0')})
# -----------------------------------------------------------------------------

# How words are cut, by the regular expressions or types in a tokenizer.json, and what llama.cpp calls the same
QWEN2 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
         r"\s+(?!\S)|\s+")
WORDS = {('ByteLevel',): 'gpt-2', ('Digits', 'ByteLevel'): 'smollm', (QWEN2,): 'qwen2',
         (QWEN2.replace(r'|\p{N}|', r'|\p{N}{1,3}|'),): 'llama-bpe'}


def export_int8(path: str | Path, checkpoint: dict, target: Path) -> None:
    model = build_model(checkpoint, path)
    kept = {key: checkpoint[key] for key in ('iter_num', 'config', 'tokenizer', 'tokenizer_fingerprint', 'start',
                                             'eot', *ASKED) if key in checkpoint}
    float_bytes = 4 * model.num_params()
    kept |= {'model': to_int8(model).state_dict(), 'model_args': model.model_args(), 'quantized': 'int8'}
    write_atomically(target, lambda f: torch.save(kept, f))
    size = target.stat().st_size
    print(f'{path}: {float_bytes / 1e6:.2f} MB of float32 weights')
    print(f'{target}: {size / 1e6:.2f} MB, {size / float_bytes:.3f} of that')


def export_hf(path: str | Path, checkpoint: dict, target: Path) -> None:
    model, tokenizer = build_model(checkpoint, path), tokenizer_of(checkpoint, path)
    save_folder(target, asdict(model.config), model.state_dict(), tokenizer, tokenizer.start,
                checkpoint.get('template', ''), model_card(path, checkpoint, model))
    print(f'{target}: {model.num_params():,} parameters, for AutoModelForCausalLM.from_pretrained({str(target)!r})')


def export_gguf(path: str | Path, checkpoint: dict, target: Path) -> None:
    try:
        import gguf
    except ImportError:
        raise UserError('GGUF files are written by a package that is not here: pip install gguf') from None
    model, tokenizer = build_model(checkpoint, path), tokenizer_of(checkpoint, path)
    args, n_vocab, source = asdict(model.config), tokenizer.vocab_size, Path(path)
    family = family_of(args, 'architecture of llama.cpp', mlps=('gelu',))
    if n_vocab > args['vocab_size']:
        raise UserError(f'{path} has a tokenizer of {n_vocab:,} ids and a model of {args["vocab_size"]:,}: they do not '
                        'belong together; use another checkpoint')
    writer = gguf.GGUFWriter(None, family)
    describe_tokenizer(writer, tokenizer, args['block_size'], checkpoint.get('template', ''))
    writer.add_name((source.parent if source.suffix == '.pt' else source).name)
    writer.add_type('model')
    writer.add_file_type(gguf.LlamaFileType[f'{"ALL" if gguf_type == "f32" else "MOSTLY"}_{gguf_type.upper()}'])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(n_vocab)
    writer.add_context_length(args['block_size'])
    writer.add_block_count(args['n_layer'])
    writer.add_embedding_length(args['n_embd'])
    writer.add_feed_forward_length(args['n_inner'])
    writer.add_head_count(args['n_head'])
    writer.add_head_count_kv(args['n_kv_head'])
    if family == 'gpt2':
        writer.add_layer_norm_eps(args['norm_eps'])
    else:
        writer.add_layer_norm_rms_eps(args['norm_eps'])
        writer.add_rope_freq_base(args['rope_theta'])
        writer.add_rope_dimension_count(args['n_embd'] // args['n_head'])
    for name, tensor in gguf_tensors(model.state_dict(), args, family, n_vocab):
        kind = 'f32' if tensor.dim() == 1 or name == 'position_embd.weight' else gguf_type
        if kind == 'q8_0' and tensor.size(1) % 32:          # which are the blocks that have a scale each
            kind = 'f16'
        dtype = gguf.GGMLQuantizationType[kind.upper()]
        writer.add_tensor(name, gguf.quants.quantize(tensor.contiguous().numpy(), dtype), raw_dtype=dtype)

    def write(f):
        with closing(writer):
            writer.write_header_to_file(Path(f.name))
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()

    write_atomically(target, write)
    print(f'{target}: {model.num_params():,} parameters, {target.stat().st_size / 1e6:.2f} MB, for llama.cpp')


def gguf_tensors(weights: dict[str, torch.Tensor], args: dict, family: str,
                 n_vocab: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields (name, tensor), as llama.cpp has them, for our state_dict: without the rows of the vocabulary's padding,
    which it would sample like others."""
    from gguf import MODEL_ARCH, get_tensor_name_map
    names = get_tensor_name_map(MODEL_ARCH[family.upper()], args['n_layer'])
    half = args['n_embd'] // args['n_head'] // 2
    for theirs, tensor in export_tensors(weights, args).items():
        name = names.get_name(theirs, try_suffixes=('.weight', '.bias'))
        if family == 'gpt2' and '.h.' in theirs:            # transformers has these the other way round
            tensor = tensor.t()
        if family == 'llama' and ('attn_q.' in name or 'attn_k.' in name):
            # of each head, channels i and i + hs/2 are turned together here, 2i and 2i + 1 there
            tensor = tensor.view(-1, 2, half, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
        yield name, tensor[:n_vocab] if name in ('token_embd.weight', 'output.weight') else tensor


def describe_tokenizer(writer: Any, tokenizer: AnyTokenizer, block_size: int, template: str) -> None:
    """Put the tokenizer, and the template of questions, into the head of a GGUF file. Raises Unsupported."""
    from gguf import TokenType
    from tokenizers import Regex, pre_tokenizers
    # without a template of its own, a page to chat on would make up one
    files = tokenizer_files(tokenizer, tokenizer.start, block_size, template or '{prompt}')
    spec = json.loads(files['tokenizer.json'])
    if (spec['decoder'] or {}).get('type') != 'ByteLevel' or tokenizer.eot is None:
        raise Unsupported(f'a tokenizer of the kind {tokenizer.kind!r} is exported only if it is a byte-level BPE with '
                          'an end-of-text token;\nprepare the data with --tokenizer=bpe or gpt2 for such an export')
    words = spec['pre_tokenizer'] or {}
    words = [next(iter(cut['pattern'].values())) if cut['type'] == 'Split' else
             cut['type'] + '?' * (cut.get('add_prefix_space', False) or not cut.get('individual_digits', True))
             for cut in words.get('pretokenizers', [words] if words else []) if cut.get('use_regex', True)]
    alone = None
    if words[1:] and re.fullmatch(r'\[[^][]+]', words[0]):     # some characters are kept by themselves
        alone = pre_tokenizers.Split(Regex(words.pop(0)), 'removed')
    added = {token['id']: token for token in spec['added_tokens']}
    texts = {i: text for text, i in spec['model']['vocab'].items()} | {i: t['content'] for i, t in added.items()}
    tokens, types = [], []
    for i in range(tokenizer.vocab_size):
        tokens.append(texts.get(i, f'[PAD{i}]'))
        types.append(TokenType.NORMAL if i in texts else TokenType.UNUSED)
        if i in added:
            types[i] = TokenType.CONTROL if added[i]['special'] else TokenType.USER_DEFINED
        elif alone and len(char := tokenizer.decode([i])) == 1 and not alone.pre_tokenize_str(char):
            tokens[i], types[i] = char, TokenType.USER_DEFINED      # which are found before words are cut
    writer.add_tokenizer_model('gpt2')
    writer.add_tokenizer_pre(WORDS.get(tuple(words), 'gpt-2'))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([m if isinstance(m, str) else ' '.join(m) for m in spec['model']['merges']])
    writer.add_bos_token_id(tokenizer.start[0] if tokenizer.start else tokenizer.eot)
    writer.add_eos_token_id(tokenizer.eot)
    writer.add_add_bos_token(bool(tokenizer.start))
    writer.add_chat_template(json.loads(files['tokenizer_config.json'])['chat_template'])
    if tuple(words) not in WORDS or spec['normalizer']:
        print("note: llama.cpp has no name for the way in which this tokenizer cuts words, and may cut some otherwise")
    elif alone:
        print('note: several blanks before a character that has no token of its own may be other tokens in llama.cpp')


def export_lora(path: str | Path, checkpoint: dict, target: Path) -> None:
    model, began = build_model(checkpoint, path, merged=False), checkpoint.get('config', {}).get('init_from', '')
    if not model.config.lora_rank:
        raise UserError(f'{path} has no adapters: it was not trained with --lora_rank; --format=hf exports all weights')
    base = GPT2_NAMES.get(began, began) if is_published(began) else None
    n = save_adapters(target, model.model_args(), model.state_dict(), base)
    print(f'{target}: {n:,} parameters of adapters, for PeftModel.from_pretrained(base, {str(target)!r})')
    print(f'base: {base or f"what python export.py --init_from={began} --format=hf writes"}')


def model_card(path: str | Path, checkpoint: dict, model: GPT) -> str:
    """README.md of the folder: what the model is and how it was trained, as far as the checkpoint says."""
    settings, shape = checkpoint.get('config', {}), model.config
    facts = {'parameters': f'{model.num_params():,}',
             'shape': f'{shape.n_layer} layers, {shape.n_head} heads, {shape.n_embd} channels, context '
                      f'{shape.block_size:,}, vocabulary {shape.vocab_size:,}',
             'made from': Path(path).name}
    if settings:
        steps, per_step = checkpoint.get('iter_num', 0), settings.get('total_batch_size', 0)
        started = settings.get('init_from')
        facts |= {'training data': settings.get('dataset'), 'optimizer steps': f'{steps:,}',
                  'tokens per step': f'{per_step:,}' if per_step else None,
                  'tokens in all': f'{steps * per_step:,}' if per_step else None,
                  'optimizer': settings.get('optimizer'), 'peak learning rate': settings.get('learning_rate'),
                  'weight decay': settings.get('weight_decay'),
                  'started from': started if started not in ('auto', 'scratch', 'resume') else None}
    if checkpoint.get('best_val_loss', float('inf')) < float('inf'):
        facts['best validation loss'] = f'{checkpoint["best_val_loss"]:.4f}'
    rows = ''.join(f'| {name} | {value} |\n' for name, value in facts.items() if value not in (None, ''))
    return ('---\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n\n# A GPT\n\n| | |\n|---|---|\n'
            + rows + '\n```python\nfrom transformers import pipeline\n\n'
              "print(pipeline('text-generation', 'THIS FOLDER')('Once upon a time', max_new_tokens=50))\n```\n\n"
              'It continues text as its training data go on. It has not been tuned to be safe or truthful.\n')


def upload(folder: Path, repo: str) -> None:
    """Put the folder on the hub as `repo`. Raises UserError, and leaves the folder, if that cannot be."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import LocalTokenNotFoundError
    try:
        api = HfApi(endpoint=os.environ.get('HF_ENDPOINT') or None)
        api.whoami()
        api.create_repo(repo, exist_ok=True)
        print(api.upload_folder(repo_id=repo, folder_path=folder))
    except LocalTokenNotFoundError:
        raise UserError(f'{folder} is written, but nobody is logged in to the hub: run `hf auth login`, or set '
                        'HF_TOKEN') from None
    except Exception as e:                          # of whatever library it talks through: no network, no right, ...
        why = first_line(e)
        raise UserError(f'{folder} is written, but the hub did not take it as {repo}: {why}') from None


def main() -> None:
    if push:
        if format != 'hf':
            raise UserError('push uploads a Hugging Face folder: say --format=hf')
        if offline():
            raise UserError(f'{offline()} forbids --push; unset the variable')
    path, checkpoint = pick_checkpoint(init_from, out_dir)
    if checkpoint.get('quantized'):
        raise UserError(f'{path} is {checkpoint["quantized"]} already; export from the checkpoint it was made of')
    beside = Path(out_dir) if not Path(path).exists() else Path(path) if Path(path).is_dir() else Path(path).parent
    target = Path(out) if out else beside / {'int8': 'int8.pt', 'gguf': f'{gguf_type}.gguf'}.get(format, format)
    if not target.parent.is_dir():
        raise UserError(f'there is no folder for out={str(target)!r}; make it first')
    mark = {'hf': 'config.json', 'lora': 'adapter_config.json'}.get(format)     # what a folder of ours has
    if target.exists() and mark and not (target.is_dir() and ((target / mark).is_file() or not any(target.iterdir()))):
        raise UserError(f'{target} holds something else than an export; choose another --out')
    if format == 'int8':
        export_int8(path, checkpoint, target)
    elif format == 'gguf':
        export_gguf(path, checkpoint, target)
    elif format == 'lora':
        export_lora(path, checkpoint, target)
    else:
        export_hf(path, checkpoint, target)
        if push:
            upload(target, push)


if __name__ == '__main__':
    main()
