"""What runs and models look like: curves of metrics.jsonl, the likeliest next tokens, maps of attention.

    python plot.py out/a out/b                          the losses of two runs, in loss.png
    python plot.py out/a --x=tokens --y=tok_per_sec     any number that metrics.jsonl has
    python plot.py out/a --terminal                     in letters, as without matplotlib (pip install matplotlib)
    python plot.py --prompt="To be or" --layer=0        what a model expects after each token, and attention.png

Without a run named, the newest under out/ is taken.
"""

import json
import logging
import math
import shutil
import statistics
import sys
import unicodedata
from bisect import bisect
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from configurator import UserError, configure, first_line
from files import write_atomically      # and no torch: it takes seconds to load, which only a prompt is worth

# -----------------------------------------------------------------------------
# curves
runs = ''                   # folders of runs, with commas between; or given without --runs=, with spaces between
x = 'steps'                 # what they are drawn over: steps, tokens or seconds
y = ''                      # loss, val_loss, ppl, lr, norm, tok_per_sec, ...: see metrics.jsonl; '' = both losses
y_max = 0.0                 # what is above is cut off, such as the beginning of a long run; 0 = nothing
# one prompt
prompt = ''                 # show what is likely after each of its tokens, and how much these look at each other
layer = -1                  # the block whose attention is drawn, from 0 on; -1 = the last
init_from = 'auto'          # a checkpoint, a published model, or a folder; auto = out_dir, or the newest run in it
out_dir = 'out'             # where runs are
# where to
terminal = False            # no picture: curves in letters, here
output_file = ''            # .png, .svg or .pdf; '' = loss.png in the folder of the run, or here; attention.png
config = configure(globals(), collect='runs', one_of={'x': ('steps', 'tokens', 'seconds')})
# -----------------------------------------------------------------------------

LABELS = {
    'loss': 'loss (nats per token)', 'val_loss': 'validation loss (nats per token)', 'ppl': 'validation perplexity',
    'bits_per_byte': 'validation loss (bits per byte of text)', 'hellaswag': 'HellaSwag accuracy',
    'zh_heldout': 'held-out questions answered right', 'lr': 'learning rate', 'norm': 'norm of the gradient',
    'dt_ms': 'time of a step (ms)', 'tok_per_sec': 'tokens per second', 'mfu': 'MFU (part of the peak)',
    'steps': 'optimizer steps', 'tokens': 'training tokens', 'seconds': 'training time (s)'}
LOSSES = ('loss', 'val_loss')       # the first is thin, or in small letters
NAME_ONE = 'name the folder of a run: python plot.py out/NAME'

# -----------------------------------------------------------------------------
# curves


def read_metrics(run: str | Path) -> list[dict]:
    """The lines of metrics.jsonl in the folder `run`: dicts, of finite numbers. Raises UserError."""
    path, rows = Path(run, 'metrics.jsonl'), []
    if not path.is_file():                  # a device, to which some logs are led, may have no end
        raise UserError(f'there is no file {path}; {NAME_ONE}')
    try:
        lines = path.read_text(encoding='utf-8').splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f'{path} cannot be read ({first_line(e)}); {NAME_ONE}') from None
    if lines and not lines[-1].endswith('}'):
        lines.pop()                         # which a run is just writing
    for n, line in enumerate(lines, 1):
        try:
            row = {key: float(value) for key, value in json.loads(line).items() if key != 'samples'}
            rows.append({'step': row['step']} | {key: value for key, value in row.items() if math.isfinite(value)})
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as e:
            raise UserError(f'{path}, line {n} is damaged ({first_line(e)}); delete that line') from None
    return rows


def curve(rows: list[dict], key: str, x: str) -> list[tuple[float, float]]:
    """[(x, value), ...] of `key` in the rows of read_metrics(). An evaluation does not note how many tokens and seconds
    went before it; as it comes before the step of its number, that follows from the steps around it."""
    at = {'steps': 'step', 'tokens': 'tokens', 'seconds': 'elapsed_s'}[x]
    known = sorted({0: 0, **{row['step'] + 1: row[at] for row in rows if at in row}}.items())   # (steps done, x)

    def place(row):
        if at in row or len(known) == 1:
            return row.get(at, 0)
        i = min(max(1, bisect(known, (row['step'],))), len(known) - 1)
        (s0, x0), (s1, x1) = known[i - 1:i + 1]
        return x0 + (x1 - x0) * (row['step'] - s0) / (s1 - s0)

    return [(place(row), row[key]) for row in rows if key in row]


def read_curves(folders: list, y: str = '', x: str = 'steps') -> dict[str, dict]:
    """{name of a run: {key: curve}} for the settings y and x. Raises UserError where there is nothing to draw."""
    names, curves = [Path(folder).resolve().name for folder in folders], {}
    for name, folder in zip(names if len(set(names)) == len(names) else folders, folders, strict=True):
        rows = read_metrics(folder)
        curves[name] = {key: points for key in ([y] if y else LOSSES) if (points := curve(rows, key, x))}
        there = sorted({key for row in rows for key in row} - {'step'})
        if not curves[name]:
            raise UserError(f'{folder} has no {y or "loss"!r}; it has {", ".join(there) or "no numbers yet"}')
        if not {'steps': True, 'tokens': 'tokens' in there, 'seconds': 'elapsed_s' in there}[x]:
            raise UserError(f'{folder} does not say how many {x} it took; --x=steps is possible')
    return curves


def short(number: float) -> str:
    """1500000 -> '1.5M'"""
    size, unit = next((pair for pair in ((1e9, 'B'), (1e6, 'M'), (1e3, 'k')) if abs(number) >= pair[0]), (1, ''))
    return f'{number / size:.4g}{unit}'


def is_thin(key: str, y: str) -> bool:
    """Whether a curve only accompanies another: the loss in training that in validation."""
    return key == 'loss' and not y


def extent(curves: dict[str, dict]) -> list[tuple[float, float]]:
    """((lowest x, highest x), (lowest value, highest value)) of the curves of read_curves()."""
    points = [point for run in curves.values() for points in run.values() for point in points]
    return [(min(values), max(values)) for values in zip(*points, strict=True)]


def in_letters(curves: dict[str, dict], y: str, x: str, y_max: float, width: int, height: int) -> list[str]:
    """The curves of read_curves() as lines of text, a letter for each run; what falls into one column is averaged."""
    letters = {name: chr(ord('A') + i % 26) for i, name in enumerate(curves)}
    drawn = [(letters[name].lower() if is_thin(key, y) else letters[name], run[key])
             for key in ([y] if y else LOSSES) for name, run in curves.items() if key in run]
    (x0, x1), (y0, y1) = extent(curves)
    y1, width = min(y1, y_max or y1), width - 12
    grid = [[' '] * width for _ in range(height)]
    for letter, points in drawn:                            # validation over training
        columns = {}
        for at, value in [point for point in points if point[1] <= y1]:
            columns.setdefault(round((at - x0) / ((x1 - x0) or 1) * (width - 1)), []).append(value)
        for column, values in columns.items():
            grid[round((y1 - statistics.fmean(values)) / ((y1 - y0) or 1) * (height - 1))][column] = letter
    ticks = [f'{y1 - (y1 - y0) * row / (height - 1):.4g}' if row % 4 == 0 else '' for row in range(height)]
    left, right = short(x0), short(x1)
    rows = [f'{tick:>9} |{"".join(row)}'.rstrip() for tick, row in zip(ticks, grid, strict=True)]
    return [LABELS.get(y or 'loss', y), *rows,
            ' ' * 10 + '+' + '-' * width,
            ' ' * 11 + left + LABELS[x].center(width - len(left + right)) + right,
            *(f'{letter} = {name}' for name, letter in letters.items()),
            *([] if y else ['small letters: training; capitals: validation'])]


def draw_curves(figure: Any, curves: dict[str, dict], names: list[str], y: str, x: str, y_max: float) -> None:
    """The curves of read_curves() on a Figure. In print without colour, dashes and markers tell the runs apart."""
    axes, legend = figure.add_subplot(), []
    for i, run in enumerate(curves.values()):
        for key, points in run.items():
            bold = dict(linewidth=2, zorder=3, marker='osD^vPX'[i % 7], markevery=max(1, len(points) // 15))
            lines = axes.plot(*zip(*points, strict=True), color=f'C{i}', linestyle=['-', '--', '-.', ':'][i % 4],
                              **(dict(linewidth=0.8, alpha=0.6) if is_thin(key, y) else bold))
        legend += lines                                     # the last of a run, which is bold if there is such a one
    axes.set_xlabel(LABELS[x])
    axes.set_ylabel(LABELS.get(y or 'loss', y))
    axes.xaxis.set_major_formatter(lambda number, _: short(number))
    if y_max:
        _, (lowest, _) = extent(curves)
        axes.set_ylim(lowest - 0.05 * (y_max - lowest), y_max)
    axes.grid(alpha=0.3)
    axes.legend(legend, names, title=None if y else 'bold: validation, thin: training', handlelength=4)


def save_curves(path: str | Path, curves: dict[str, dict], y: str = '', x: str = 'steps', y_max: float = 0) -> tuple:
    """Draw the curves of read_curves() into the file `path`; returns the Figure, and the names that its runs have."""
    families, names = legible(list(curves))
    return save_picture(path, (8, 5), families, draw_curves, curves, names, y, x, y_max), names


def draw_run(out_dir: str | Path) -> None:
    """The losses of a run in out_dir/loss.png, if matplotlib is installed. train.py ends with this, which therefore
    raises nothing: the run is done, and a picture can be drawn later."""
    logging.getLogger('matplotlib').setLevel(logging.ERROR)         # it tells where it keeps its list of fonts
    try:
        save_curves(Path(out_dir, 'loss.png'), read_curves([out_dir]))
    except ModuleNotFoundError:
        pass
    except Exception as e:
        with suppress(OSError):
            print(f'warning: there is no loss.png: {first_line(e)}', file=sys.stderr, flush=True)


# -----------------------------------------------------------------------------
# pictures


def has_matplotlib() -> bool:
    """Whether there can be a picture; if not, it says so. Raises UserError if that was asked for."""
    try:
        from matplotlib import figure, font_manager     # noqa: F401
        return True
    except Exception as e:                              # half installed, it may fail with anything
        if output_file:
            raise UserError(f'{output_file} needs matplotlib ({first_line(e)}): pip install matplotlib') from None
        print(f'no picture, as it needs matplotlib ({first_line(e)}): pip install matplotlib', file=sys.stderr)
        return False


def save_picture(path: str | Path, size: tuple, families: list[str], draw: Callable, *args) -> Any:
    """Let draw(figure, *args) draw on a Figure of `size` inches, and write it to `path`; returns it. Without pyplot, so
    that there are no windows, and nothing is left behind."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    with rc_context({'font.family': families, 'text.parse_math': False, 'agg.path.chunksize': 10_000}):
        figure = Figure(figsize=size, layout='constrained')
        draw(figure, *args)
        write_atomically(path, lambda f: figure.savefig(f, format=Path(path).suffix[1:], dpi=150))
    return figure


def legible(texts: list[str]) -> tuple[list[str], list[str]]:
    """(font families, labels): the texts themselves, or their numbers if no installed font has all the characters."""
    from matplotlib import font_manager
    from matplotlib.ft2font import FT2Font

    def characters(path):
        with suppress(OSError, RuntimeError):
            font = FT2Font(path)
            return font.get_charmap().keys() if font.scalable else set()
        return set()

    usual = 'DejaVu Sans'                               # comes with matplotlib
    needed = set(map(ord, ''.join(texts))) - characters(font_manager.findfont(usual))
    fonts = [font for font in font_manager.fontManager.ttflist if not font.name.startswith('Last Resort')]
    fonts = sorted(fonts, key=lambda font: (font.style != 'normal', font.weight != 400, font.name)) if needed else []
    found = next((font.name for font in fonts if needed <= characters(font.fname)), '')
    return ([usual, found], texts) if found else ([usual], [str(i) for i in range(len(texts))] if needed else texts)


# -----------------------------------------------------------------------------
# a prompt


def look_inside(model: Any, ids: list[int], layer: int) -> tuple:
    """(logits (T, V), the attention of a layer (nh, T, T)) for a list of T token ids, from one forward pass."""
    import torch

    from model import attention
    seen = []

    def look(attn, args):
        x, norm, rope, _, mask = args
        q, k, _ = attn.queries_keys_values(x, norm, rope)
        # the model computes softmax(q k^T / sqrt(hs)) v: with the identity for v, this is the softmax
        identity = torch.eye(len(ids), dtype=q.dtype, device=q.device).expand(*k.shape[:2], -1, -1)
        seen.append(attention(q, k, identity, mask)[0])

    hook = model.transformer.h[layer].attn.register_forward_pre_hook(look)
    try:
        with torch.no_grad():
            logits, _ = model(torch.tensor([ids], device=next(model.parameters()).device))
    finally:
        hook.remove()
    return logits[0], seen[0]


def visible(tokenizer: Any, i: int) -> str:
    """A token as a text in which white space is seen; #227, its number, if it is no whole character."""
    if i == tokenizer.eot:
        return '<eot>'
    text = tokenizer.decode([i, i])[len(tokenizer.decode([i])):]    # some drop a space where a text begins
    if not text or '\ufffd' in text:
        return f'#{i}'
    text = text.translate(str.maketrans(' \n\t', '␣↵⇥'))
    return ''.join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def columns(text: str) -> int:
    """How many columns of a terminal a text takes: a Chinese character two, a combining mark none."""
    return sum(0 if unicodedata.category(c) in ('Mn', 'Me', 'Cf') else 1 + (unicodedata.east_asian_width(c) in 'WF')
               for c in text)


def cell(text: str, width: int) -> str:
    """A text in just so many columns of a terminal."""
    if columns(text) > width:
        while columns(text) >= width:
            text = text[:-1]
        text += '…'
    return text + ' ' * (width - columns(text))


def table(tokens: list[str], likeliest: list[list[tuple[str, float]]]) -> list[str]:
    """Lines of text: each token with its place, and what may follow it, [(token, probability), ...]."""
    wide = min(12, max(5, *map(columns, tokens)))
    next_wide = min(12, max(columns(token) for row in likeliest for token, _ in row))
    return [f'place  {cell("token", wide)}   likely to follow',
            *(f'{i:5}  {cell(token, wide)}   ' + '   '.join(f'{cell(t, next_wide)} {p:6.1%}' for t, p in row)
              for i, (token, row) in enumerate(zip(tokens, likeliest, strict=True)))]


def draw_attention(figure: Any, weights: Any, labels: list[str], title: str) -> None:
    """A map for each head of weights (nh, T, T): the darker, the more the token of the row takes from the column's."""
    n_head, T = len(weights), len(labels)
    n_columns = math.ceil(math.sqrt(n_head))
    n_rows = math.ceil(n_head / n_columns)
    grid = figure.subplots(n_rows, n_columns, squeeze=False)
    places = range(0, T, math.ceil(T / 40))
    for head, axes in enumerate(grid.flat):
        if head >= n_head:
            axes.axis('off')
            continue
        image = axes.imshow(weights[head], cmap='Greys', vmin=0, vmax=1)
        axes.set_title(f'head {head}')
        below, left = head // n_columns == n_rows - 1, head % n_columns == 0
        axes.set_xticks(places if below else [], [labels[i] for i in places] if below else [], rotation=90)
        axes.set_yticks(places if left else [], [labels[i] for i in places] if left else [])
    figure.colorbar(image, ax=grid, label='attention; each row adds up to 1')
    figure.suptitle(title)
    figure.supxlabel('the token that is looked at')
    figure.supylabel('the token that looks')


# -----------------------------------------------------------------------------


def show_prompt() -> None:
    from checkpoint import load_for_use
    from tokenizer import encode_prompt
    model, tokenizer, checkpoint, description = load_for_use(init_from, out_dir, 'cpu', 'float32')
    print(description, file=sys.stderr)
    n_layer, template = model.config.n_layer, checkpoint.get('template', '')
    if not -1 <= layer < n_layer:
        raise UserError(f'layer must be from 0 to {n_layer - 1}, or -1 for the last, not {layer}')
    ids = encode_prompt(prompt, tokenizer, template)
    if len(ids) > model.config.block_size:
        raise UserError(f'the prompt has {len(ids)} tokens, and this model sees {model.config.block_size}; shorten it')
    logits, weights = look_inside(model, ids, layer)
    best = logits[:, :tokenizer.vocab_size].softmax(dim=-1).topk(min(5, tokenizer.vocab_size))
    tokens = [visible(tokenizer, i) for i in ids]
    likeliest = [[(visible(tokenizer, i), p) for i, p in zip(*row, strict=True)]
                 for row in zip(best.indices.tolist(), best.values.tolist(), strict=True)]
    print(*table(tokens, likeliest), sep='\n')
    if not terminal and has_matplotlib():
        path, names = output_file or 'attention.png', [cell(token, min(12, columns(token))) for token in tokens]
        families, labels = legible(names)
        inches, n_columns = 1 + 0.16 * min(40, len(ids)), math.ceil(math.sqrt(len(weights)))
        size = inches * n_columns + 2, inches * math.ceil(len(weights) / n_columns) + 1.2
        save_picture(path, size, families, draw_attention, weights.numpy(), labels,
                     f'attention in layer {layer % n_layer} (of 0 to {n_layer - 1})')
        print(f'wrote {path}' + ('' if labels == names else '; its numbers are places, as no font has all the tokens'))


def show_curves() -> None:
    folders = [run for run in runs.split(',') if run]
    if not folders:
        found = [path for place in ('', '*/') for path in Path(out_dir).glob(f'{place}metrics.jsonl')]
        if not found:
            raise UserError(f'there is no metrics.jsonl under {out_dir!r}; {NAME_ONE}')
        folders = [str(max(found, key=lambda path: path.stat().st_mtime_ns).parent)]
    curves = read_curves(folders, y, x)
    _, (lowest, _) = extent(curves)
    if y_max and y_max <= lowest:
        raise UserError(f'y_max {y_max:g} cuts everything off: the lowest value is {lowest:g}')
    if terminal or not has_matplotlib():
        width, height = shutil.get_terminal_size()
        print(*in_letters(curves, y, x, y_max, max(40, width), min(25, max(13, height - 6 - len(curves)))), sep='\n')
    else:
        path = output_file or Path(folders[0] if len(folders) == 1 else '', f'{y or "loss"}.png')
        _, names = save_curves(path, curves, y, x, y_max)
        print(*(f'{n} = {name}' for n, name in zip(names, curves, strict=True) if n != name), f'wrote {path}', sep='\n')


def main():
    if prompt and runs:
        raise UserError(f'a prompt is for one model: --init_from={runs.split(",")[0]} --prompt=...')
    if output_file and Path(output_file).suffix not in ('.png', '.svg', '.pdf'):
        raise UserError(f'output_file must end in .png, .svg or .pdf, not {output_file!r}')
    if output_file and (Path(output_file).is_dir() or not Path(output_file).parent.is_dir()):
        raise UserError(f'there is no folder for output_file {output_file!r}; make it first')
    if prompt:
        show_prompt()
    else:
        show_curves()


if __name__ == '__main__':
    main()
