"""
One way to fetch a file: resumable, verified, from a mirror if you like.

    download('https://host/corpus.txt', 'data/corpus.txt', sha256='...')
    hub_download('openai-community/gpt2', 'model.safetensors', 'weights')

Environment: HF_ENDPOINT chooses a mirror of the Hugging Face hub, HF_TOKEN opens gated files there (and is sent to that
one address only), HF_HUB_OFFLINE=1 or HF_DATASETS_OFFLINE=1 forbids the network. HTTP as in RFC 9110: section 13.1.5
is If-Range, 14 is ranges, 10.2.3 is Retry-After.
"""
import errno
import json
import os
import random
import re
import sys
import time
from contextlib import contextmanager
from datetime import timezone
from email.utils import parsedate_to_datetime
from pathlib import Path
from time import sleep
from urllib.parse import quote, urljoin

import requests
import urllib3

from configurator import UserError
from files import beside, locked, sha256_of

try:
    from tqdm import tqdm
except ImportError:  # a plain line instead of a bar
    tqdm = None

TIMEOUT = (10, 30)            # seconds: to connect, and between two pieces of an answer
TRIES = 7                     # in a row without progress; the waits between them add up to at most a minute
BACKOFF, BACKOFF_MAX = 1, 60  # seconds: the first wait, doubled each time, and the longest
RETRY_AFTER_MAX = 300         # seconds a server may make us wait at a time
RETRY_STATUS = {429, 500, 502, 503, 504}
MAX_REDIRECTS = 10
CHUNK = 1 << 16               # bytes; what a cut connection can lose
BAR_DELAY = 2                 # seconds; anything shorter needs no progress bar


class DownloadError(UserError):
    """One or two lines: what is wrong and what to do. Scripts print it and exit with status 2."""

# -----------------------------------------------------------------------------
# the Hugging Face hub

def hub_endpoint():
    """The hub or its mirror, from HF_ENDPOINT, without a slash at the end."""
    endpoint = os.environ.get('HF_ENDPOINT', '').strip().rstrip('/') or 'https://huggingface.co'
    if not re.match(r'https?://[^/]', endpoint):
        raise DownloadError(f'HF_ENDPOINT={plain(endpoint)!r} is no address: it must begin with https:// or http://')
    return endpoint


def hub_url(repo, filename, repo_type='model', revision='main'):
    """The address of one file of a hub repository; repo_type is 'model' or 'dataset'."""
    kind = {'model': '', 'dataset': 'datasets/'}[repo_type]
    # a revision such as refs/convert/parquet is one step of the path, so its slashes are quoted
    return f"{hub_endpoint()}/{kind}{quote(repo)}/resolve/{quote(revision, safe='')}/{quote(filename)}"


def hub_download(repo, filename, folder, *, repo_type='model', revision='main', **options):
    """Fetch one file of a hub repository to folder/filename; options are those of download(). Returns the Path."""
    if filename.startswith('/') or '\\' in filename or '..' in filename.split('/'):  # names may come from a listing
        raise DownloadError(f'{filename!r} would leave {folder}: give a path inside the repository')
    return download(hub_url(repo, filename, repo_type, revision), Path(folder) / filename, **options)


def hub_files(repo, folder='', *, repo_type='model', revision='main', keep=None):
    """
    All files of a hub repository below `folder`: [{'path', 'size' in bytes, 'sha256' or None}], sorted by path.

    The tree API answers in pages, each with the address of the next in its Link header; large files carry their LFS
    SHA-256. keep: a file for the list, which is read from there where the network is forbidden. Raises DownloadError.
    """
    if offline():
        try:
            found = json.loads(Path(keep).read_text(encoding='utf-8'))
            if found and all(isinstance(entry['path'], str) and isinstance(entry['size'], int)
                             and isinstance(entry['sha256'], str | None) for entry in found):
                return found
        except (OSError, ValueError, KeyError, TypeError):
            pass  # none is kept, or it is damaged, which is as good as none
        raise DownloadError(f'{offline()} forbids asking {plain(hub_endpoint())} for the files of {repo}.\n'
                            'Unset the variable, or name what is on disk: a folder, or files with --input.')
    kind = {'model': 'models', 'dataset': 'datasets'}[repo_type]
    url = (f"{hub_endpoint()}/api/{kind}/{quote(repo)}/tree/{quote(revision, safe='')}"
           f"{'/' + quote(folder) if folder else ''}?recursive=true")
    found = []
    while url:
        response = request(url)
        try:
            for entry in response.json():
                if entry['type'] == 'file':
                    found.append({'path': entry['path'], 'size': entry['size'],
                                  'sha256': (entry.get('lfs') or {}).get('oid')})
        except (ValueError, KeyError, TypeError, AttributeError):
            raise DownloadError(f'{plain(url)}: is not the list of files that it should be. Check HF_ENDPOINT, and\n'
                                'whether a proxy or a login page answers in its place.') from None
        following = response.links.get('next', {}).get('url')
        url = urljoin(url, following) if following else None
    found.sort(key=lambda entry: entry['path'])
    if keep:
        try:
            Path(keep).parent.mkdir(parents=True, exist_ok=True)
            part = beside(Path(keep), f'.{os.getpid()}.part')
            part.write_text(json.dumps(found, indent=1), encoding='utf-8')
            os.replace(part, keep)
        except OSError as error:
            raise DownloadError(f'{keep}: cannot be written: {error.strerror or error}. '
                                'Check the folder and its permissions.') from None
    return found


def hub_token():
    """HF_TOKEN or None. A token with a stray character would end up in an error message of the HTTP library."""
    token = os.environ.get('HF_TOKEN', '').strip()
    if token and not re.fullmatch('[!-~]+', token):
        raise DownloadError('HF_TOKEN holds a space or another character that no token has: copy it again')
    return token or None


def offline():
    """The variable that forbids the network, as NAME=value, or None."""
    for name in ('HF_HUB_OFFLINE', 'HF_DATASETS_OFFLINE'):
        if os.environ.get(name, '').strip().lower() in {'1', 'true', 'yes', 'on'}:
            return f'{name}={os.environ[name]}'

# -----------------------------------------------------------------------------
# asking

def plain(url):
    """The address without what may be secret (user and password, presigned query): the one way to print it."""
    return re.sub(r'//[^/]*@', '//', re.split('[?#]', url)[0])


def origin(url):
    """(scheme, host, port). Parsed as the HTTP library does: where two parsers differ, a token goes astray."""
    parts = urllib3.util.parse_url(url)
    return parts.scheme, parts.host, parts.port or {'http': 80, 'https': 443}.get(parts.scheme)


def request(url, *, method='GET', headers=None, stream=False):
    """
    One answer below 400 (or 416, which only a range can cause), after as many tries as it takes, up to TRIES.

    Returns requests.Response, its `history` the redirects that led there; close it if stream=True. Raises
    DownloadError when the server refuses or stays away.
    """
    with requests.Session() as session:
        session.auth = lambda prepared: prepared  # or ~/.netrc would be asked for a password; proxies stay as set
        for attempt in range(TRIES):
            delay = backoff(attempt)
            try:
                response = follow(session, method, url, headers or {}, stream)
            except ValueError as error:
                raise DownloadError(f'{plain(url)}: cannot be asked for ({type(error).__name__}). '
                                    'Check the address and the proxy settings.') from None
            except requests.RequestException as error:
                problem = f'no answer ({type(error).__name__})'  # str(error) would quote the presigned query
            except OSError as error:  # REQUESTS_CA_BUNDLE names no file
                raise DownloadError(f'{plain(url)}: cannot connect: {error}') from None
            else:
                status = response.status_code
                if status < 400 or status == 416:
                    return response
                response.close()
                if status not in RETRY_STATUS:
                    raise DownloadError(refusal(url, status))
                problem = f'HTTP {status}'
                delay = retry_after(response.headers.get('Retry-After'), otherwise=delay)
            if attempt + 1 < TRIES:
                if delay > 5:
                    print(f'{plain(url)}: {problem}, trying again in {delay:.0f} s', file=sys.stderr)
                sleep(delay)
    raise DownloadError(f'{plain(url)}: {problem}, {TRIES} times in a row.\n'
                        'Check the network and the proxy, try later, or choose a mirror with HF_ENDPOINT.')


def follow(session, method, url, headers, stream):
    """Send a request and follow its redirects by hand, so that each host sees the token only if it is the hub."""
    home, token, first, history = origin(hub_endpoint()), hub_token(), url, []
    while len(history) <= MAX_REDIRECTS:
        # identity, since sizes, ranges and checksums mean the bytes of the file, not of a compressed copy
        sent = {'Accept-Encoding': 'identity', **headers}
        if token and origin(url) == home:
            sent['Authorization'] = f'Bearer {token}'
        response = session.request(method, url, headers=sent, stream=stream, timeout=TIMEOUT, allow_redirects=False)
        target = session.get_redirect_target(response)
        if target is None:
            response.history = history
            return response
        response.close()
        history.append(response)
        url = urljoin(url, target)
    raise DownloadError(f'{plain(first)}: more than {MAX_REDIRECTS} redirects. Check the address, or HF_ENDPOINT.')


def refusal(url, status):
    if status in (401, 403):
        return (f'{plain(url)}: no access (HTTP {status}), or no such repository. Check the name, set HF_TOKEN\n'
                f'(it is sent to {plain(hub_endpoint())} only) and accept the licence on its page, if it has one.')
    if status == 404:
        return f'{plain(url)}: not found (HTTP 404). Check the name, the revision, and HF_ENDPOINT if a mirror is set.'
    return f'{plain(url)}: refused (HTTP {status}). Check the address.'


def backoff(attempt):
    """Seconds: 1, 2, 4, ... with jitter, so that many processes do not come back at once. Leaves seeded RNGs alone."""
    return min(BACKOFF * 2 ** attempt, BACKOFF_MAX) * random.SystemRandom().uniform(0.5, 1)


def retry_after(value, otherwise):
    """Seconds from a Retry-After header, which holds seconds or a date; `otherwise` where it holds neither."""
    delay = number(value)
    if delay is None:
        try:
            date = parsedate_to_datetime(value)
        except (TypeError, ValueError):
            return otherwise
        delay = date.replace(tzinfo=date.tzinfo or timezone.utc).timestamp() - time.time()
    return min(max(delay, 0), RETRY_AFTER_MAX)


def number(text):
    """A count in a header, or None where there is none or it is nonsense."""
    return int(text) if re.fullmatch('[0-9]{1,18}', text or '') else None

# -----------------------------------------------------------------------------
# receiving

def download(url, path, *, sha256=None, size=None, progress=True):
    """
    Make sure that the file of `url` is whole at `path`, and return that Path.

    A file that is there and fits size (bytes) and sha256 (hex), where given, is returned without any network. Else it
    comes by way of PATH.part, which an interrupted download leaves behind and the next one goes on from. A file that
    is there and does not fit is replaced only when the new one is whole and verified. Processes that want the same
    path share one download. Raises DownloadError.
    """
    path = Path(path)
    sha256 = sha256.lower() if sha256 else None
    try:
        if path.is_dir():
            raise DownloadError(f'{path} is a folder: give the path of the file')
        if path.is_file() and not mismatch(path, size, sha256):
            return path
        if offline():
            state = 'is not the file it should be' if path.exists() else 'is missing'
            raise DownloadError(f'{path} {state}, and {offline()} forbids the network.\n'
                                f'Fetch {plain(url)} to that path, or unset the variable.')
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path, 'fetching'):
            if path.is_file() and not mismatch(path, size, sha256):  # by now another process has fetched it
                return path
            part = beside(path, '.part')
            with progress_bar(path.name, progress) as show:
                fetch(url, part, size, sha256, show)
            with open(part, 'rb+') as file:
                os.fsync(file.fileno())  # the name must not outlive the bytes if the power fails
            os.replace(part, path)
            beside(part, '.json').unlink(missing_ok=True)
            return path
    except OSError as error:
        todo = 'Make room' if error.errno == errno.ENOSPC else 'Check the folder and its permissions'
        raise DownloadError(f'{path}: cannot be written: {error.strerror or error}. '
                            f'{todo}, then run again: what is there already is kept.') from None


def fetch(url, part, size, sha256, show):
    """Bring `part` to a whole, verified file, starting from what it holds. show(have, total) is told of progress."""
    side = beside(part, '.json')
    best = tries = wrong = 0
    while True:
        # 1) ask for the rest, if what is here can be told from the head of another version of the file
        have, etag = partial(part, side, sha256)
        headers = {'Range': f'bytes={have}-'} if have else {}
        if have and etag:
            headers['If-Range'] = etag
        with request(url, headers=headers, stream=True) as response:
            status, (start, total) = response.status_code, span(response)
            want_size, want_sha256 = published(response, size, sha256)
            same = etag is None or response.headers.get('ETag', etag) == etag

            # 2) receive it; `problem` is a reason to ask again, `fault` a reason to distrust all there is
            problem = fault = None
            if status not in (200, 206, 416):
                raise DownloadError(f'{plain(url)}: HTTP {status} instead of the file. Check the address.')
            if status == 416:  # nothing follows: either all is here already, or this is a part of something else
                whole = total if total is not None else want_size
                if not (have and same and have == whole):
                    problem = 'the file has changed'
                    part.unlink(missing_ok=True)
            elif start != (have if status == 206 else 0) or (status == 206 and not same):
                problem = 'the server sends another piece than the one asked for'
                part.unlink(missing_ok=True)
            elif None not in (total, want_size) and total != want_size:
                fault = f'the server offers {total:,} bytes, not {want_size:,}'  # not worth losing the partial for
            elif receive(response, part, side, start, total, show):
                problem = 'the connection was cut'

        # 3) go on where it stopped; only tries that bring nothing new are counted
        if problem:
            have = part.stat().st_size if part.exists() else 0
            best, tries = (have, 0) if have > best else (best, tries + 1)
            if tries == TRIES:
                raise DownloadError(f'{plain(url)}: {problem}, {tries} times in a row without progress.\n'
                                    f'{have:,} bytes are kept: run again to go on, or try a mirror with HF_ENDPOINT.')
            sleep(backoff(tries))
            continue

        # 4) trust nothing unverified; one accident is forgiven
        if fault is None:
            fault = mismatch(part, total if want_size is None else want_size, want_sha256)
            if fault is None:
                return
            part.unlink()
        wrong += 1
        if wrong == 2:
            raise DownloadError(f'{plain(url)}: {fault}, twice. It is not the file that is wanted:\n'
                                'the source has changed or a proxy meddles. Try later, or a mirror with HF_ENDPOINT.')


def receive(response, part, side, start, total, show):
    """Append the body to `part` from byte `start` on. Returns whether the connection was cut before the end."""
    have, cut = start, False
    with open(part, 'ab' if start else 'wb') as file:
        if not start:  # emptied first, then labelled: bytes never stand under the label of another version
            etag = response.headers.get('ETag', '')
            side.write_text(json.dumps({'etag': None if etag.startswith('W/') else etag or None}), encoding='utf-8')
        try:
            for chunk in response.raw.stream(CHUNK, decode_content=False):
                file.write(chunk)
                have += len(chunk)
                show(have, total)
        except urllib3.exceptions.HTTPError:  # reset, timed out, or closed too early
            cut = True
    return cut if total is None else have < total


def partial(part, side, sha256):
    """(bytes to go on from, their ETag or None). Zero bytes where nothing could tell that they are of the same file."""
    try:
        etag = json.loads(side.read_text(encoding='utf-8'))['etag']
    except (OSError, ValueError, KeyError, TypeError):
        etag = None
    have = part.stat().st_size if part.exists() else 0
    return (have, etag) if etag or sha256 else (0, None)  # a weak ETag would not do: it allows other bytes


def span(response):
    """(first byte, size of the whole file) of a body, by its Content-Range or Content-Length; None where unsaid."""
    if response.status_code == 200:
        return 0, number(response.headers.get('Content-Length'))
    said = re.fullmatch(r'bytes (?:(\d+)-\d+|\*)/(\d+|\*)', response.headers.get('Content-Range', '').strip())
    return (number(said[1]), number(said[2])) if said else (None, None)


def published(response, size, sha256):
    """Size and SHA-256 to hold the file against: the caller's, else the hub's, which it puts on its redirect."""
    for answer in (*response.history, response):
        if size is None:
            size = number(answer.headers.get('X-Linked-Size'))
        linked = re.fullmatch('"?([0-9a-f]{64})"?', answer.headers.get('X-Linked-ETag', ''))
        if sha256 is None and linked:  # files kept in git itself have a SHA-1 of 40 digits there
            sha256 = linked[1]
    return size, sha256


def mismatch(path, size, sha256):
    """What is wrong with a file, in words, or None. size and sha256 may be None."""
    actual = path.stat().st_size
    if size is not None and actual != size:
        return f'{actual:,} bytes instead of {size:,}'
    if sha256 is None:
        return None
    actual = sha256_of(path)
    return None if actual == sha256 else f'SHA-256 {actual} instead of {sha256}'


@contextmanager
def progress_bar(name, progress):
    """Gives show(have, total) in bytes: on a long transfer a bar on standard error, or now and then a line in a log."""
    wants_bar, bar, due = tqdm and sys.stderr.isatty(), None, time.monotonic() + BAR_DELAY

    def show(have, total):
        nonlocal bar, due
        if wants_bar and bar is None:  # made late, so that bytes from an earlier run do not count as speed
            bar = tqdm(desc=name, initial=have, total=total, unit='B', unit_scale=True, delay=BAR_DELAY)
        elif wants_bar:
            bar.total = total
            bar.update(have - bar.n)
        elif time.monotonic() > due:
            due += 30
            print(f'{name}: {have / 1e6:,.1f}' + (f' of {total / 1e6:,.1f}' if total else '') + ' MB', file=sys.stderr)

    try:
        yield show if progress else lambda have, total: None
    finally:
        if bar is not None:
            bar.close()
