"""Published weights in and out: models in the layout that `transformers` keeps them in.

A folder holds config.json, model.safetensors (or several, with an index) and tokenizer.json. GPT-2 shapes are read and
written as GPT2LMHeadModel, Llama-class shapes as LlamaForCausalLM, with biases on queries, keys and values alone as
Qwen2ForCausalLM. One table, tensor_map(), serves both ways. Only .safetensors are read, which cannot hold code.
"""

import difflib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from safetensors.torch import save_file

from configurator import UserError
from download import DownloadError, hub_download, hub_files
from files import write_atomically
from tokenizer import END_OF_TEXT, AnyTokenizer, from_state, gpt2_tokenizer, load_tokenizer

GPT2_NAMES = {'gpt2': 'openai-community/gpt2', 'gpt2-medium': 'openai-community/gpt2-medium',
              'gpt2-large': 'openai-community/gpt2-large', 'gpt2-xl': 'openai-community/gpt2-xl'}
MODELS = Path('models')                 # downloaded weights: models/<owner>--<name>/
GPT2_ACTIVATIONS = {'gelu_new': 'gelu', 'gelu_pytorch_tanh': 'gelu', 'gelu': 'gelu_erf', 'silu': 'silu',
                    'swish': 'silu', 'relu2': 'relu2'}
WEIGHTS, INDEX = 'model.safetensors', 'model.safetensors.index.json'
CHAT = ('tokenizer_config.json', 'chat_template.jinja')         # either may hold the template of a chat


class Unsupported(UserError):
    """A model that this GPT is not, or a shape that `transformers` has no class for; the message names the reason."""


# -----------------------------------------------------------------------------
# finding

def is_published(name: str) -> bool:
    """Whether `name` means a model in Hugging Face's layout: gpt2, gpt2-medium, ..., a folder that holds one, or
    owner/name on the hub (unless there is a local folder called owner, or one that is nearly called owner/name: then it
    is a mistyped path)."""
    if Path(name).exists():
        return Path(name, 'config.json').is_file()
    owner = name.partition('/')[0]
    is_path = Path(owner).exists() or owner in ('out', 'data', 'models', '.', '..') or near_folder(name)
    return name in GPT2_NAMES or bool(re.fullmatch(r'[\w.-]+/[\w.-]+', name)) and not is_path


def near_folder(name: str) -> str:
    """The folder two levels down from here that has nearly this name, or ''."""
    here = [path.as_posix() for path in Path('.').glob('*/*') if path.is_dir()]
    return next(iter(difflib.get_close_matches(name, here, n=1, cutoff=0.8)), '')


def same_model(one: str, other: str) -> bool:
    """Whether two names or paths mean the same model."""
    return os.path.normpath(GPT2_NAMES.get(one, one)) == os.path.normpath(GPT2_NAMES.get(other, other))


def fetch(name: str) -> Path:
    """The folder with the model `name`, downloaded from the hub or its mirror if need be. Raises UserError."""
    if Path(name).is_dir():
        return Path(name)
    repo = GPT2_NAMES.get(name, name)
    folder = MODELS / repo.replace('/', '--')
    if all((folder / path).is_file() for path in ['config.json', *_weight_files(folder)]):
        return folder                   # the weights come last, and a file has its name only when it is whole
    try:
        files = {f['path']: f for f in hub_files(repo, keep=folder / 'files.json')}
    except DownloadError as e:
        raise DownloadError(str(e) if name in GPT2_NAMES else f'{name} is no folder here, and {e}') from None
    wanted = ['config.json', 'tokenizer.json', *CHAT, INDEX if INDEX in files else WEIGHTS]
    if not {'config.json', wanted[-1]} <= files.keys():
        raise Unsupported(f'{repo} on the hub has no config.json with {WEIGHTS}; only that format is read, as loading\n'
                          'others could run code. Convert it, and name the folder with --init_from')
    if INDEX in files:
        hub_download(repo, INDEX, folder, size=files[INDEX]['size'])
        wanted += _weight_files(folder)
    for path in wanted:
        if path in files:
            hub_download(repo, path, folder, sha256=files[path]['sha256'], size=files[path]['size'])
    return folder


def _weight_files(folder):
    """The names of the files with the weights of a folder: those of its index, or the one."""
    if not Path(folder, INDEX).is_file():
        return [WEIGHTS]
    try:
        names = sorted(set(_read_json(Path(folder, INDEX))['weight_map'].values()))
        outside = any(Path(name).name != name for name in names)
    except (KeyError, TypeError, AttributeError):
        raise UserError(f'{Path(folder, INDEX)} has no weight_map; fetch it again') from None
    if outside:
        raise UserError(f'{Path(folder, INDEX)} names files outside its folder; it is not loaded')
    return names


def _read_json(path):
    try:
        content = json.loads(Path(path).read_text(encoding='utf-8'))
        if not isinstance(content, dict):
            raise ValueError('it is no object')
        return content
    except (OSError, ValueError) as e:
        raise UserError(f'{path} cannot be read ({e}); fetch it again') from None


# -----------------------------------------------------------------------------
# config.json <-> GPTConfig

def read_config(config: dict, where: str | Path = 'config.json') -> dict:
    """GPTConfig's arguments for a config.json, a dict. Raises Unsupported, naming the feature that we do not have."""
    kind = config.get('model_type')

    def must_be(key, *allowed):
        value = config.get(key, allowed[0])
        if value not in allowed:
            raise Unsupported(f'{where}: {key}={value!r} is not supported; this GPT has only '
                              + ' or '.join(map(repr, allowed)))

    if kind not in ('gpt2', 'llama', 'qwen2'):
        raise Unsupported(f'{where}: model_type {kind!r} is not supported; gpt2, llama and qwen2 are')
    for key in ('quantization_config', 'auto_map', 'num_experts', 'num_local_experts'):
        must_be(key, None)
    try:
        if kind == 'gpt2':
            for key, value in {'scale_attn_weights': True, 'scale_attn_by_inverse_layer_idx': False,
                               'add_cross_attention': False}.items():
                must_be(key, value)
            must_be('activation_function', *GPT2_ACTIVATIONS)
            return dict(block_size=config.get('n_positions', 1024), vocab_size=config['vocab_size'],
                        n_layer=config['n_layer'], n_head=config['n_head'], n_embd=config['n_embd'],
                        n_inner=config.get('n_inner') or 0, norm_eps=config.get('layer_norm_epsilon', 1e-5),
                        mlp=GPT2_ACTIVATIONS[config.get('activation_function', 'gelu_new')],
                        tie_weights=config.get('tie_word_embeddings', True))

        rope = config.get('rope_parameters') or config.get('rope_scaling') or {}
        rope_type = rope.get('rope_type', rope.get('type', 'default'))
        if rope_type != 'default':
            raise Unsupported(f'{where}: rope scaling {rope_type!r} is not supported; this GPT has only plain rotary '
                              'embeddings')
        if rope.get('partial_rotary_factor', config.get('partial_rotary_factor', 1.0)) != 1.0:
            raise Unsupported(f'{where}: partial_rotary_factor is not supported; all channels are turned here')
        must_be('hidden_act', 'silu', 'swish')
        must_be('rope_interleaved', False, None)
        if config.get('use_sliding_window', kind == 'llama'):
            must_be('sliding_window', None)
        if set(config.get('layer_types') or ()) - {'full_attention'}:
            raise Unsupported(f'{where}: layer_types other than full_attention are not supported')
        n_head, n_embd = config['num_attention_heads'], config['hidden_size']
        must_be('head_dim', n_embd // n_head, None)
        bias = bool(config.get('attention_bias', False)) and kind == 'llama'
        if bias != bool(config.get('mlp_bias', False)):
            raise Unsupported(f'{where}: attention_bias without mlp_bias, or the reverse, is not supported')
        return dict(block_size=config['max_position_embeddings'], vocab_size=config['vocab_size'],
                    n_layer=config['num_hidden_layers'], n_head=n_head, n_embd=n_embd,
                    n_kv_head=config.get('num_key_value_heads') or n_head, n_inner=config['intermediate_size'],
                    norm='rmsnorm', norm_eps=config.get('rms_norm_eps', 1e-6), position='rope', mlp='swiglu',
                    rope_theta=float(rope.get('rope_theta', config.get('rope_theta', 10000.0))), bias=bias,
                    qkv_bias=kind == 'qwen2', tie_weights=config.get('tie_word_embeddings', False))
    except KeyError as e:
        raise UserError(f'{where} has no {e}; is it the whole file?') from None


def family_of(args: dict, has: str = 'class of transformers',
              mlps: tuple[str, ...] = ('gelu', 'gelu_erf', 'silu', 'relu2')) -> str:
    """'gpt2', 'llama' or 'qwen2': the class of `transformers` that has the shape `args`, a whole GPTConfig as a dict.
    Raises Unsupported, naming the switch that none has. has, mlps: for what else goes by these names, and what it has
    between the matrices of a GPT-2."""
    def refuse(switch, instead):
        raise Unsupported(f'{switch}={args[switch]!r} cannot be exported: no {has} has it with the '
                          f'other switches of this model;\ntrain with {switch}={instead} for such an export')

    if args['qk_norm']:
        refuse('qk_norm', False)
    if args['norm'] == 'layernorm':
        for switch, value in {'position': 'learned', 'bias': True, 'n_kv_head': args['n_head']}.items():
            if args[switch] != value:
                refuse(switch, value)
        if args['mlp'] not in mlps:
            refuse('mlp', 'gelu')
        return 'gpt2'
    for switch, value in {'norm': 'rmsnorm', 'position': 'rope', 'mlp': 'swiglu'}.items():
        if args[switch] != value:
            refuse(switch, value)
    return 'qwen2' if args['qkv_bias'] and not args['bias'] else 'llama'


def write_config(args: dict, bos: int | None, eos: int | None) -> dict:
    """config.json, a dict, for a whole GPTConfig as a dict; bos, eos: token ids or None."""
    family = family_of(args)
    common = {'architectures': [{'gpt2': 'GPT2LMHeadModel', 'llama': 'LlamaForCausalLM',
                                 'qwen2': 'Qwen2ForCausalLM'}[family]],
              'model_type': family, 'vocab_size': args['vocab_size'], 'tie_word_embeddings': args['tie_weights'],
              'bos_token_id': bos, 'eos_token_id': eos, 'pad_token_id': None, 'torch_dtype': 'float32'}
    if family == 'gpt2':
        activation = next(theirs for theirs, ours in GPT2_ACTIVATIONS.items() if ours == args['mlp'])
        return common | {'n_positions': args['block_size'], 'n_embd': args['n_embd'], 'n_layer': args['n_layer'],
                         'n_head': args['n_head'], 'n_inner': args['n_inner'], 'activation_function': activation,
                         'layer_norm_epsilon': args['norm_eps'], 'attn_pdrop': args['dropout'],
                         'embd_pdrop': args['dropout'], 'resid_pdrop': args['dropout']}
    config = common | {'max_position_embeddings': args['block_size'], 'hidden_size': args['n_embd'],
                       'num_hidden_layers': args['n_layer'], 'num_attention_heads': args['n_head'],
                       'num_key_value_heads': args['n_kv_head'], 'head_dim': args['n_embd'] // args['n_head'],
                       'intermediate_size': args['n_inner'], 'hidden_act': 'silu', 'rms_norm_eps': args['norm_eps'],
                       'rope_theta': args['rope_theta'],            # transformers 4 reads this one, 5 the next
                       'rope_parameters': {'rope_type': 'default', 'rope_theta': args['rope_theta']}}
    if family == 'qwen2':
        return config | {'use_sliding_window': False}
    return config | {'attention_bias': args['bias'], 'mlp_bias': args['bias']}


# -----------------------------------------------------------------------------
# tensors

def tensor_map(family: str, args: dict) -> Iterator[tuple[str, list[str], bool]]:
    """Yields (our name, [their names], transposed) for every tensor of a model.

    Where they keep several, ours is those on top of each other: queries, keys and values; gate and up. GPT-2's own
    linear layers keep their weights the other way round.
    """
    names = {'gpt2': {'wte': 'transformer.wte', 'wpe': 'transformer.wpe', 'h': 'transformer.h', 'ln_f':
                      'transformer.ln_f', 'ln_1': 'ln_1', 'ln_2': 'ln_2', 'attn.c_attn': ['attn.c_attn'],
                      'attn.c_proj': ['attn.c_proj'], 'mlp.c_fc': ['mlp.c_fc'], 'mlp.c_proj': ['mlp.c_proj']}}
    llama = {'wte': 'model.embed_tokens', 'h': 'model.layers', 'ln_f': 'model.norm', 'ln_1': 'input_layernorm',
             'ln_2': 'post_attention_layernorm',
             'attn.c_attn': ['self_attn.q_proj', 'self_attn.k_proj', 'self_attn.v_proj'],
             'attn.c_proj': ['self_attn.o_proj'], 'mlp.c_fc': ['mlp.gate_proj', 'mlp.up_proj'],
             'mlp.c_proj': ['mlp.down_proj']}
    theirs: dict = names.get(family, llama)
    norm_parts = ('weight', 'bias') if family == 'gpt2' else ('weight',)
    yield 'transformer.wte.weight', [theirs['wte'] + '.weight'], False
    if family == 'gpt2':
        yield 'transformer.wpe.weight', [theirs['wpe'] + '.weight'], False
    for i in range(args['n_layer']):
        for norm in ('ln_1', 'ln_2'):
            for part in norm_parts:
                yield f'transformer.h.{i}.{norm}.{part}', [f'{theirs["h"]}.{i}.{theirs[norm]}.{part}'], False
        for layer in ('attn.c_attn', 'attn.c_proj', 'mlp.c_fc', 'mlp.c_proj'):
            has_bias = args['bias'] or args['qkv_bias'] and layer == 'attn.c_attn'
            for part in ('weight', 'bias') if has_bias else ('weight',):
                yield (f'transformer.h.{i}.{layer}.{part}', [f'{theirs["h"]}.{i}.{t}.{part}' for t in theirs[layer]],
                       family == 'gpt2' and part == 'weight')
    for part in norm_parts:
        yield f'transformer.ln_f.{part}', [f'{theirs["ln_f"]}.{part}'], False
    if not args['tie_weights']:
        yield 'lm_head.weight', ['lm_head.weight'], False


def read_tensors(folder: str | Path) -> dict[str, torch.Tensor]:
    """{name: tensor} of all .safetensors that a folder's index names, or of its one file. Raises UserError."""
    folder, tensors = Path(folder), {}
    for name in _weight_files(folder):
        if not (folder / name).is_file():
            pickled = ' (a pickled pytorch_model.bin could run code, and is not loaded)' * any(folder.glob('*.bin'))
            raise UserError(f'{folder} lacks {name}{pickled}; save the model with save_pretrained(), which writes it')
        try:
            with safe_open(folder / name, framework='pt') as f:
                tensors |= {key: f.get_tensor(key) for key in f.keys()}             # noqa: SIM118
        except (SafetensorError, OSError) as e:
            raise UserError(f'{folder / name} is damaged ({e}); fetch it again') from None
    return tensors


def import_tensors(tensors: dict[str, torch.Tensor], args: dict, family: str,
                   where: str | Path) -> dict[str, torch.Tensor]:
    """Our state_dict, float32, from their tensors. Raises UserError if one is missing, or left over."""
    if family == 'gpt2' and 'wte.weight' in tensors:                # as OpenAI's are published: without the prefix
        tensors = {k if k.startswith('lm_head') else f'transformer.{k}': v for k, v in tensors.items()}
    # masks and angles that older files carry along, made anew by every model
    tensors = {k: v for k, v in tensors.items()
               if not re.search(r'\.attn\.(bias|masked_bias)$|\.rotary_emb\.inv_freq$', k)}
    ours, embedding = {}, None
    for name, theirs, transposed in tensor_map(family, args):
        missing = [t for t in theirs if t not in tensors]
        if missing:
            raise UserError(f'{where} lacks the tensor {missing[0]}; is it whole, and does its config.json belong to '
                            'it?')
        tensor = torch.cat([tensors.pop(t).float() for t in theirs])
        ours[name] = tensor.t().contiguous() if transposed else tensor
    if args['tie_weights']:
        embedding = ours['lm_head.weight'] = ours['transformer.wte.weight']
        head = tensors.pop('lm_head.weight', None)
        if head is not None and not torch.equal(head.float(), embedding):
            raise Unsupported(f'{where}: config.json says tie_word_embeddings, but lm_head.weight is another matrix')
    if tensors:
        raise Unsupported(f'{where} has {len(tensors)} tensors that this GPT has no place for: '
                          f'{", ".join(sorted(tensors)[:3])}')
    return ours


def export_tensors(weights: dict[str, torch.Tensor], args: dict) -> dict[str, torch.Tensor]:
    """Their tensors, {name: tensor}, from our state_dict. Raises Unsupported if the table does not know one of ours."""
    tensors, table = {}, list(tensor_map(family_of(args), args))
    unknown = weights.keys() - {name for name, *_ in table} - ({'lm_head.weight'} if args['tie_weights'] else set())
    if unknown:
        raise Unsupported(f'{len(unknown)} tensors of this model have no place in an export: '
                          f'{", ".join(sorted(unknown)[:3])}')
    for name, theirs, transposed in table:
        tensor = weights[name].detach()
        for t, part in _split_rows(tensor.t() if transposed else tensor, theirs, args):
            tensors[t] = part
    return tensors


def _split_rows(tensor, theirs, args):
    """(their name, its rows) for each of their tensors that are on top of each other in one of ours; see tensor_map."""
    head_size = args['n_embd'] // args['n_head']
    sizes = {1: [tensor.size(0)], 2: [args['n_inner']] * 2,
             3: [n * head_size for n in (args['n_head'], args['n_kv_head'], args['n_kv_head'])]}[len(theirs)]
    return [(t, part.contiguous()) for t, part in zip(theirs, tensor.split(sizes), strict=True)]


# -----------------------------------------------------------------------------
# tokenizers

def read_tokenizer(folder: str | Path, config: dict) -> tuple[AnyTokenizer | None, list[int], int | None]:
    """(tokenizer or None, ids that begin a text, the id that ends one or None) of a folder in their layout."""
    from tokenizers import Tokenizer
    path = Path(folder, 'tokenizer.json')
    tokenizer, start = None, []
    if path.is_file():
        tokenizer = load_tokenizer(path)
        text = path.read_text(encoding='utf-8')
        start = Tokenizer.from_str(text).encode('').ids[:1]         # what its own template puts before a text
        if tokenizer.kind == 'bpe' and start == [tokenizer.eot]:    # our documents begin so in any case: as we train it
            plain = json.dumps({**json.loads(text), 'post_processor': None})
            tokenizer = from_state({'kind': 'bpe', 'tokenizer.json': Tokenizer.from_str(plain).to_str()})
    elif config['model_type'] == 'gpt2' and config['vocab_size'] in (50257, 50304):
        tokenizer = gpt2_tokenizer()
    eos = config.get('eos_token_id')
    eos = eos[0] if isinstance(eos, list) and eos else eos
    return tokenizer, start, eos if isinstance(eos, int) and tokenizer and eos < tokenizer.vocab_size else None


def read_chat_template(folder: str | Path) -> tuple[str, str | None]:
    """(template, end): a folder's chat template in jinja, '' if it has none, and the token that ends an answer, as
    text, or None. What transformers would tell the template of special tokens is set at its head: it stands by itself.
    """
    settings: dict = {}
    for name in ('special_tokens_map.json', CHAT[0]):               # what the second says counts
        if Path(folder, name).is_file():
            settings |= _read_json(Path(folder, name))
    template = settings.get('chat_template')
    try:
        if Path(folder, CHAT[1]).is_file():
            template = Path(folder, CHAT[1]).read_text(encoding='utf-8')
        elif isinstance(template, list):                            # several, by name
            named = {one['name']: one['template'] for one in template}
            template = named.get('default') or next(iter(named.values()), None)
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f'the chat template in {folder} cannot be read ({e!r}); fetch it again') from None
    if not isinstance(template, str):
        return '', None
    names = [f'{kind}_token' for kind in ('bos', 'eos', 'unk', 'sep', 'pad', 'cls', 'mask')]
    special = {n: t.get('content') if isinstance(t, dict) else t for n in names if (t := settings.get(n))}
    # each in a line of its own, of which transformers, and sample.py, leave nothing
    head = ''.join(f'{{% set {name} = {json.dumps(text)} %}}\n' for name, text in special.items())
    return head + template, special.get('eos_token')


def tokenizer_files(tokenizer: AnyTokenizer, start: list[int], block_size: int, template: str) -> dict[str, str]:
    """{'tokenizer.json': text, 'tokenizer_config.json': text} that transformers loads; start: see read_tokenizer."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    if tokenizer.kind == 'bpe':
        bpe = Tokenizer.from_str(tokenizer.text)
    elif tokenizer.kind == 'gpt2':
        bpe = Tokenizer(models.BPE(*_vocab_and_merges(tokenizer.bpe)))
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
    else:
        bpe = Tokenizer(models.WordLevel(dict(tokenizer.ids), unk_token=None))
        bpe.pre_tokenizer = pre_tokenizers.Split(Regex(r'[\s\S]'), 'isolated')
        bpe.decoder = decoders.Fuse()
    end = None
    if tokenizer.eot is not None:
        end = bpe.id_to_token(tokenizer.eot) or END_OF_TEXT
        bpe.add_special_tokens([AddedToken(end, special=True, normalized=False)])
        if start == [tokenizer.eot]:                                # as our documents begin
            bpe.post_processor = processors.TemplateProcessing(single=f'{end} $A', pair=f'{end} $A $B',
                                                               special_tokens=[(end, tokenizer.eot)])
    settings = {'tokenizer_class': 'PreTrainedTokenizerFast', 'model_max_length': block_size,
                'bos_token': bpe.id_to_token(start[0]) if start else end, 'eos_token': end,
                'clean_up_tokenization_spaces': False}
    if template and '{prompt}' not in template:
        settings['chat_template'] = template
    elif template:
        before, behind = (json.dumps(part, ensure_ascii=False) for part in template.split('{prompt}', 1))
        bos = '{{ bos_token }}' if start else ''    # for nothing is put before what a template has made
        settings['chat_template'] = (               # as tokenizer.conversation() has it
            f"{bos}{{% for m in messages %}}{{% if m['role'] == 'assistant' %}}{{{{ m['content'] + '\\n' }}}}"
            f"{{% else %}}{{{{ {before} + m['content'] + {behind} }}}}{{% endif %}}{{% endfor %}}")
    return {'tokenizer.json': bpe.to_str(), 'tokenizer_config.json': json.dumps(settings, indent=2) + '\n'}


def _vocab_and_merges(encoding):
    """A tiktoken Encoding's byte strings as GPT-2 writes them, {token: id}, and its merges [(left, right)]."""
    printable = [*range(ord('!'), ord('~') + 1), *range(ord('¡'), ord('¬') + 1), *range(ord('®'), ord('ÿ') + 1)]
    letters = {b: chr(b) for b in printable}
    letters |= {b: chr(256 + n) for n, b in enumerate(b for b in range(256) if b not in letters)}
    ranks = encoding._mergeable_ranks
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [bytes([b]) for b in token]
        while len(parts) > 2:                   # apply the merges made before this one: what is left are its two sides
            pairs = [ranks.get(a + b, rank) for a, b in zip(parts, parts[1:], strict=False)]
            at = pairs.index(min(pairs))
            parts[at:at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) == 2:
            merges.append(parts)

    def spell(token):
        return ''.join(letters[b] for b in token)

    return {spell(token): i for token, i in ranks.items()}, [(spell(a), spell(b)) for a, b in merges]


# -----------------------------------------------------------------------------
# whole models

def read_model(name: str) -> tuple[dict, dict[str, torch.Tensor], dict, Path]:
    """(GPTConfig's arguments, our state_dict, config.json, folder) of a model: see is_published for its name."""
    folder = fetch(name)
    config = _read_json(folder / 'config.json')
    args = {'bias': True, 'qkv_bias': False, **read_config(config, folder / 'config.json')}
    return args, import_tensors(read_tensors(folder), args, config['model_type'], folder), config, folder


def load_published(name: str) -> dict:
    """A published model as if it were a checkpoint of ours, as load_checkpoint() returns one. Raises UserError."""
    args, weights, config, folder = read_model(name)
    tokenizer, start, end = read_tokenizer(folder, config)
    template, end_of_answer = read_chat_template(folder) if tokenizer else ('', None)
    if end_of_answer:
        end, = tokenizer.encode(end_of_answer, special=True)[-1:] or [end]
    return {'model': weights, 'model_args': args, 'config': {}, 'template': template, 'tokenizer':
            tokenizer and tokenizer.state(), 'start': start, 'eot': end}


def save_folder(out: str | Path, args: dict, weights: dict[str, torch.Tensor], tokenizer: AnyTokenizer,
                start: list[int], template: str = '', card: str = '') -> None:
    """Write a model as a folder that transformers loads without code of ours. Raises Unsupported, before any writing.

    args: a whole GPTConfig as a dict. weights: our state_dict. start: the ids before every text, [] or one.
    card: README.md.
    """
    out = Path(out)
    config = write_config(args, start[0] if start else tokenizer.eot, tokenizer.eot)
    unused = list(range(tokenizer.vocab_size, args['vocab_size']))  # padding: ids that no text has
    generation = {'bos_token_id': config['bos_token_id'], 'eos_token_id': tokenizer.eot,
                  **({'suppress_tokens': unused} if unused else {})}
    files = {'config.json': json.dumps(config, indent=2) + '\n', 'README.md': card,
             'generation_config.json': json.dumps(generation) + '\n',
             **tokenizer_files(tokenizer, start, args['block_size'], template)}
    tensors = export_tensors(weights, args)
    out.mkdir(parents=True, exist_ok=True)
    tmp = out / (WEIGHTS + '.tmp')
    save_file(tensors, tmp, metadata={'format': 'pt'})
    tmp.replace(out / WEIGHTS)
    for name, text in files.items():
        (out / name).write_text(text, encoding='utf-8', newline='\n')
    (out / WEIGHTS).chmod((out / 'config.json').stat().st_mode)     # save_file lets nobody else read it


def save_adapters(out: str | Path, args: dict, weights: dict[str, torch.Tensor], base: str | None) -> int:
    """Write a model's adapters as a folder that PEFT loads; returns how many parameters these are. Raises Unsupported.

    args, weights: as for save_folder. base: the name of the model beside which they stand, or None. Where they have
    several layers for one of ours, each has all of A, and of B its own rows: the sums are the same.
    """
    tensors, layers = {}, set()
    for name, theirs, _ in tensor_map(family_of(args), args):
        a, b = (weights.get(name.removesuffix('weight') + part) for part in ('lora_A', 'lora_B'))
        for t, rows in _split_rows(b, theirs, args) if a is not None else []:
            layer = 'base_model.model.' + t.removesuffix('.weight')
            tensors |= {f'{layer}.lora_A.weight': a.clone(), f'{layer}.lora_B.weight': rows}
            layers.add(layer.split('.', 5)[5])      # what stands behind base_model.model.model.layers.0
    config = {'peft_type': 'LORA', 'task_type': 'CAUSAL_LM', 'base_model_name_or_path': base, 'r': args['lora_rank'],
              'lora_alpha': args['lora_alpha'], 'target_modules': sorted(layers), 'lora_dropout': 0.0, 'bias': 'none',
              'fan_in_fan_out': family_of(args) == 'gpt2', 'inference_mode': True}
    Path(out).mkdir(parents=True, exist_ok=True)
    write_atomically(Path(out, 'adapter_model.safetensors'), lambda f: f.write(to_bytes(tensors, {'format': 'pt'})))
    write_atomically(Path(out, 'adapter_config.json'), lambda f: f.write(json.dumps(config, indent=2).encode()))
    return sum(t.numel() for t in tensors.values())
