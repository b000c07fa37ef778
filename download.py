"""
One way to fetch a file, verified: from the Hugging Face hub or a mirror of it, or from a plain address.

    hub_download('openai-community/gpt2', 'model.safetensors', 'weights')
    download('https://host/corpus.txt', 'data/corpus.txt', sha256='...', size=1115394)

Environment: HF_ENDPOINT chooses a mirror of the hub, HF_TOKEN (or `hf auth login`) opens gated files there and is sent
to that one address only, HF_HUB_OFFLINE=1 or HF_DATASETS_OFFLINE=1 forbids the network, HF_HUB_DISABLE_XET=1 keeps to
plain HTTP. The libraries that do it are imported when something is fetched: they take a quarter of a second.
"""
import errno
import functools
import json
import logging
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from urllib.parse import urljoin

from configurator import UserError
from files import beside, locked, sha256_of, write_text_atomically

HUB = 'https://huggingface.co'
TIMEOUT = 30            # seconds to connect, and between two pieces of an answer, where the library sets no limit
TRIES = 5               # in a row without progress
BACKOFF = 1             # seconds: the first wait between tries, doubled each time
WAIT_MAX = 300          # seconds a server may make us wait at a time
XET_LIMITS = {          # where Xet is barred it is given up within half a minute; by itself it takes over four
    'HF_XET_CLIENT_CONNECT_TIMEOUT': '5s', 'HF_XET_CLIENT_READ_TIMEOUT': '10s',
    'HF_XET_CLIENT_RETRY_MAX_ATTEMPTS': '2', 'HF_XET_CLIENT_RETRY_BASE_DELAY': '500ms'}


class DownloadError(UserError):
    """One or two lines: what is wrong and what to do. Scripts print it and exit with status 2."""

# -----------------------------------------------------------------------------
# settings

def hub_endpoint() -> str:
    """The hub or its mirror, from HF_ENDPOINT, without a slash at the end."""
    endpoint = os.environ.get('HF_ENDPOINT', '').strip().rstrip('/') or HUB
    if not re.match(r'https?://[^/]', endpoint):
        raise DownloadError(f'HF_ENDPOINT={plain(endpoint)!r} is no address: it must begin with https:// or http://')
    return endpoint


def hub_token() -> str | bool:
    """HF_TOKEN, else the stored one, which goes to no mirror, else False: for None the library would look by itself."""
    token = os.environ.get('HF_TOKEN', '').strip()
    if not token and hub_endpoint() == HUB:
        token = hub_library().get_token() or ''
    if token and not re.fullmatch('[!-~]+', token):     # it would end up in an error message of the HTTP library
        raise DownloadError('HF_TOKEN holds a space or another character that no token has: copy it again')
    return token or False


def offline() -> str | None:
    """The variable that forbids the network, as NAME=value, or None."""
    for name in ('HF_HUB_OFFLINE', 'HF_DATASETS_OFFLINE'):
        if os.environ.get(name, '').strip().lower() in {'1', 'true', 'yes', 'on'}:
            return f'{name}={os.environ[name]}'
    return None


def plain(text: str) -> str:
    """An address, or a text with some, without what may be secret (user and password, presigned query)."""
    return re.sub(r'(https?://[^\s?#]*)[?#]\S*', r'\1', re.sub(r'//[^/\s]*@', '//', text))


@functools.cache
def hub_library() -> ModuleType:
    """huggingface_hub, taught what it does not do by itself, for all the requests that it makes in this process."""
    import huggingface_hub.file_download
    from huggingface_hub import constants
    constants.HF_HUB_DISABLE_TELEMETRY = True       # else it first asks the hub for a page of its own
    constants.DOWNLOAD_CHUNK_SIZE = 1 << 16         # a cut loses that much; with the default of 10 MB, too much

    def before(request):
        # the address as the request itself parses it: where two parsers differ, a token goes astray
        url, home = request.url, type(request.url)(hub_endpoint())
        if (url.scheme, url.host, url.port) != (home.scheme, home.host, home.port):
            request.headers.pop('Authorization', None)
        if request.method == 'GET' and not request.extensions['timeout']['read']:   # listings would wait for ever
            request.extensions['timeout'] = dict.fromkeys(('connect', 'read', 'write', 'pool'), TIMEOUT)

    def after(response):                            # the library waits for as long as it is told to
        for name, seconds in (('Retry-After', r'^\d+$'), ('RateLimit', r'(?<=t=)\d+')):
            if value := response.headers.get(name):
                response.headers[name] = re.sub(seconds, lambda m: str(min(int(m[0]), WAIT_MAX)), value)

    def without_secrets(record):                    # it logs whole addresses
        record.msg, record.args = plain(record.getMessage()), ()
        return True

    first = huggingface_hub.get_session()
    hooks = {'request': [*first.event_hooks['request'], before], 'response': [*first.event_hooks['response'], after]}
    huggingface_hub.set_client_factory(lambda: type(first)(event_hooks=hooks, follow_redirects=True))
    for handler in logging.getLogger('huggingface_hub').handlers:
        handler.addFilter(without_secrets)
    return huggingface_hub


@contextmanager
def in_words(url: str, is_hub: bool = True) -> Iterator[None]:
    """Whatever goes wrong between us and a server, of any of the HTTP libraries, becomes a DownloadError."""
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or getattr(error, 'errno', None):       # the disk has its own words
            raise
        url, status = plain(url), getattr(getattr(error, 'response', None), 'status_code', None)
        # never str(error), which quotes presigned addresses
        problem = f'HTTP {status}' if status else f'no answer ({type(error).__name__})'
        if not is_hub:
            said = f'{problem}. Check the address, the network and the proxy.'
        elif status in (401, 403):
            said = (f'no access (HTTP {status}), or no such repository. Check the name, set HF_TOKEN\n'
                    f'(it is sent to {plain(hub_endpoint())} only) and accept the licence on its page, if it has one.')
        elif status == 404:
            said = 'not found (HTTP 404). Check the name, the revision, and HF_ENDPOINT if a mirror is set.'
        elif isinstance(error, ValueError | KeyError | TypeError | AttributeError) and not status:
            said = ('is not what it should be. Check the address, HF_ENDPOINT, and\n'
                    'whether a proxy or a login page answers in its place.')
        else:
            said = (f'{problem}. Check the address,\n'
                    'the network and the proxy, try later, or choose a mirror with HF_ENDPOINT.')
        raise DownloadError(f'{url}: {said}') from None


@contextmanager
def disk_in_words(path: str | Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        todo = 'Make room' if error.errno == errno.ENOSPC else 'Check the folder and its permissions'
        raise DownloadError(f'{path}: cannot be written: {error.strerror or error}. '
                            f'{todo}, then run again: what is there already is kept.') from None

# -----------------------------------------------------------------------------
# the Hugging Face hub

def hub_files(repo: str, folder: str = '', *, repo_type: str = 'model', revision: str = 'main',
              keep: str | Path | None = None) -> list[dict]:
    """
    All files of a hub repository below `folder`: [{'path', 'size' in bytes, 'sha256' or None}], sorted by path.

    Only large files carry a SHA-256. keep: a file for the list, which is read from there where the network is
    forbidden. Raises DownloadError.
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
    endpoint = hub_endpoint()
    with in_words(f'{endpoint}/{repo}'):
        api = hub_library().HfApi(endpoint=endpoint, token=hub_token())
        found = [{'path': entry.path, 'size': entry.size, 'sha256': entry.lfs.sha256 if entry.lfs else None}
                 for entry in api.list_repo_tree(repo, folder or None, recursive=True, revision=revision,
                                                 repo_type=repo_type) if hasattr(entry, 'size')]    # or it is a folder
    found.sort(key=lambda entry: entry['path'])
    if keep:
        with disk_in_words(keep):
            Path(keep).parent.mkdir(parents=True, exist_ok=True)
            with locked(keep, 'writing'):
                write_text_atomically(keep, json.dumps(found, indent=1))
    return found


def hub_download(repo: str, filename: str, folder: str | Path, *, name: str | None = None, repo_type: str = 'model',
                 revision: str = 'main', sha256: str | None = None, size: int | None = None) -> Path:
    """
    Fetch one file of a hub repository to folder/filename, or folder/name, unless it is there. Returns the Path.

    It is held against size (bytes) and sha256 (hex), or else against those that the hub has for it, and is there
    only when it is whole. An interrupted download is gone on with by the next. Raises DownloadError.
    """
    if filename.startswith('/') or '\\' in filename or '..' in filename.split('/'):  # names may come from a listing
        raise DownloadError(f'{filename!r} would leave {folder}: give a path inside the repository')
    path, endpoint = Path(folder) / (name or filename), hub_endpoint()
    where = dict(repo_type=repo_type, revision=revision, endpoint=endpoint)

    def bring(part):
        library, tries = hub_library(), 0
        url, token = library.hf_hub_url(repo, filename, **where), hub_token()
        with in_words(url):
            while True:
                # 1) what does the hub have? anew each time, as a signed address does not last
                meta = library.get_hf_file_metadata(url, token=token, endpoint=endpoint, retry_on_errors=True)
                if meta.commit_hash is None:
                    raise ValueError('this is no hub')
                total = meta.size if size is None else size
                digest = sha256 or (meta.etag if re.fullmatch('[0-9a-f]{64}', meta.etag or '') else None)
                if meta.size not in (None, total):      # not worth losing the partial file for
                    raise DownloadError(f'{plain(url)}: the hub offers {meta.size:,} bytes, not {total:,}. It is not '
                                        'the file that is wanted:\nit has changed, or HF_ENDPOINT names a stale mirror')

                # 2) fetch the rest of it, if there is a SHA-256 to tell whether it is that
                have = part.stat().st_size if digest and part.exists() else 0
                have = 0 if have > (total or 0) else have
                # whoever names a mirror wants the bytes from there; and what Xet has begun cannot be gone on with
                by_chunks = meta.xet_file_data and endpoint == HUB and not have
                if by_chunks and by_xet(part, repo, filename, token=token, **where):
                    return total, digest
                headers = {**library.utils.build_hf_headers(token=token), 'Accept-Encoding': 'identity'}
                try:
                    with open(part, 'ab' if have else 'wb') as file:
                        library.file_download.http_get(
                            urljoin(url, meta.location), file, resume_size=have, headers=headers,
                            expected_size=total, displayed_filename=path.name)
                    return total, digest
                except Exception as error:
                    answer = getattr(error, 'response', None)
                    status, wait = (answer.status_code, answer.headers.get('Retry-After', '')) if answer else (0, '')
                    if isinstance(error, OSError) and not status and not error.errno:
                        return total, digest            # another size than expected: fetched() judges it
                    tries = tries + 1 if part.stat().st_size <= have else 0
                    if tries == TRIES or isinstance(error, OSError) and status < 500:
                        raise                           # the disk, or an answer that is final
                    time.sleep(int(wait) if wait.isdecimal() else BACKOFF * 2 ** tries)

    return fetched(path, size, sha256, f'{filename} of {repo} from {plain(endpoint)}', bring)


def by_xet(part: Path, repo: str, filename: str, **where) -> bool:
    """Whether the file came in the chunks of Xet, the hub's own way, the fastest; where it is barred, HTTP remains."""
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.file_download import is_xet_available
    folder = beside(part, '.xet')
    shutil.rmtree(folder, ignore_errors=True)           # what a killed process has left cannot be gone on with
    if not is_xet_available():
        return False
    for variable, value in XET_LIMITS.items():
        os.environ.setdefault(variable, value)
    try:
        os.replace(hf_hub_download(repo, filename, local_dir=folder, **where), part)
        return True
    except Exception as error:      # a full disk, too, has its own words there, and will be met again
        print(f'{filename}: no way to Xet ({type(error).__name__}), so plain HTTP', file=sys.stderr)
        constants.HF_HUB_DISABLE_XET = True             # once is enough
        return False
    finally:
        shutil.rmtree(folder, ignore_errors=True)

# -----------------------------------------------------------------------------
# plain addresses

def download(url: str, path: str | Path, *, sha256: str, size: int) -> Path:
    """
    Fetch the file of `url` to `path`, unless it is there, and return that Path. Raises DownloadError.

    It is there only when it fits sha256 (hex) and size (bytes). For small files: what is cut begins again.
    """
    def bring(part):
        import requests
        from urllib3 import Retry
        retry = Retry(TRIES, connect=2, backoff_factor=BACKOFF, status_forcelist=(429, 500, 502, 503, 504),
                      raise_on_status=False, retry_after_max=WAIT_MAX)
        with in_words(url, is_hub=False), requests.Session() as session:
            for scheme in ('http://', 'https://'):
                session.mount(scheme, requests.adapters.HTTPAdapter(max_retries=retry))
            for more in reversed(range(TRIES)):
                with session.get(url, headers={'Accept-Encoding': 'identity'}, timeout=TIMEOUT, stream=True) as answer:
                    answer.raise_for_status()
                    try:
                        with open(part, 'wb') as file:
                            file.writelines(answer.iter_content(1 << 16))
                        return size, sha256
                    except requests.RequestException:
                        if not more:
                            raise

    return fetched(path, size, sha256, plain(url), bring)


def fetched(path: str | Path, size: int | None, sha256: str | None, source: str,
            bring: Callable[[Path], tuple[int | None, str | None]]) -> Path:
    """
    `path`, where the file is or has been brought by now; `source` says in words where from.

    bring(PATH.part) fetches it and returns the size and the SHA-256 to hold it against, None where there is none.
    Processes that want the same path share one download. A file that does not fit stays until there is a better one.
    """
    path = Path(path)
    if path.is_dir():
        raise DownloadError(f'{path} is a folder: give the path of the file')
    with disk_in_words(path):
        if path.is_file() and not mismatch(path, size, sha256):
            return path
        if offline():
            raise DownloadError(f'{path} {"is not the file it should be" if path.exists() else "is missing"}, and '
                                f'{offline()} forbids the network.\nFetch {source} to that path, or unset the '
                                'variable.')
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path, 'fetching'):
            if path.is_file() and not mismatch(path, size, sha256):     # by now another process has fetched it
                return path
            part = beside(path, '.part')
            for _ in range(2):              # one accident is forgiven
                fault = mismatch(part, *bring(part))
                if not fault:
                    with open(part, 'rb+') as file:
                        os.fsync(file.fileno())     # the name must not outlive the bytes if the power fails
                    os.replace(part, path)
                    return path
                part.unlink()
    raise DownloadError(f'{source}: {fault}, twice. It is not the file that is wanted:\n'
                        'the source has changed or a proxy meddles.')


def mismatch(path: Path, size: int | None, sha256: str | None) -> str | None:
    """What is wrong with a file, in words, or None. size and sha256 may be None."""
    actual = path.stat().st_size
    if size is not None and actual != size:
        return f'{actual:,} bytes instead of {size:,}'
    if sha256 is not None and (digest := sha256_of(path)) != sha256.lower():
        return f'SHA-256 {digest} instead of {sha256.lower()}'
    return None
