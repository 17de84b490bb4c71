"""Which files a model has, in a local folder or on the Hub: a file that nobody could ask for is not a missing one."""

import os
from collections.abc import Sequence
from pathlib import Path

from transformers import AutoTokenizer
from transformers.utils.hub import (
    _CACHED_NO_EXIST,
    EntryNotFoundError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    hf_hub_download,
    try_to_load_from_cache,
)

# The base class of all errors of the library with which huggingface_hub sends requests; releases differ in the library.
CLIENT_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]
# The options of `from_pretrained` that say where the files of a model are.
HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "subfolder")
# The files of a tokenizer that transformers saves, and all from which it builds one.
SAVED_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
TOKENIZER_FILES = (
    *SAVED_TOKENIZER_FILES,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "sentencepiece.bpe.model",
    "spiece.model",
    "tokenizer.model",
)


def find_file(name_or_path: str | os.PathLike, file: str, **hub) -> str | None:
    """Return the path of an optional file of a model folder or Hub repository; None only if it certainly is not there.

    What counts as an answer is the listing of a local folder, the Hub's "entry not found", and the mark that an earlier
    one left in the cache. A server that is out of order or refuses says nothing about the file, and neither does a
    cache that holds only a part of the repository.

    Args:
        name_or_path: a folder, or the id of a repository on the Hub.
        file: the path of the file in it.
        **hub: `revision`, `token`, `cache_dir`, `local_files_only` and `subfolder`, as in `from_pretrained`.

    Raises:
        OSError: whether the file exists could not be found out.
    """
    file = f"{hub.pop('subfolder', None) or ''}/{file}".lstrip("/")
    if os.path.isdir(name_or_path):
        path = Path(name_or_path, file)
        try:
            path.stat()
        except (FileNotFoundError, NotADirectoryError):
            if not path.is_symlink():
                return None
            raise OSError(f"{path} is a link to a file that is not there; download the model again") from None
        except OSError as error:
            raise OSError(f"{path} cannot be read ({error.strerror}); give yourself access to it") from None
        return str(path)
    try:
        return hf_hub_download(str(name_or_path), file, **hub)
    except LocalEntryNotFoundError as error:  # first, because it is an EntryNotFoundError too
        cause = error.__cause__
    except EntryNotFoundError:
        return None
    except CLIENT_ERROR as error:
        cause = error
    if is_known_to_be_absent(str(name_or_path), file, **{key: hub.get(key) for key in ("revision", "cache_dir")}):
        return None
    raise OSError(
        f"whether {name_or_path} has a file {file} could not be found out ({missing_answer(cause)}); try again when "
        "the Hub answers, or download the whole repository and give its folder"
    )


def is_known_to_be_absent(name: str, file: str, revision: str | None = None, cache_dir: str | None = None) -> bool:
    """Return whether the cache of the Hub says that a repository has no such file: by a mark, or by its listing.

    Args:
        name: the id of the repository.
        file: the path of the file in it.
        revision: branch, tag or commit; None: `main`.
        cache_dir: folder of the cache; None: that of the Hub's library.
    """
    if try_to_load_from_cache(name, file, revision=revision, cache_dir=cache_dir) is _CACHED_NO_EXIST:
        return True
    try:  # newer releases keep the listing of a repository that was downloaded whole
        from huggingface_hub import get_cached_repo_tree
        from huggingface_hub.errors import CachedRepoTreeNotFoundError
    except ImportError:
        return False
    try:
        listing = get_cached_repo_tree(name, revision=revision, cache_dir=cache_dir)
    except CachedRepoTreeNotFoundError:
        return False
    return file not in {entry.path for entry in listing}


def missing_answer(cause: BaseException | None) -> str:
    """Return in a few words why the Hub did not answer; `cause` is what was raised, None if nobody asked."""
    if cause is None or isinstance(cause, OfflineModeIsEnabled):
        return "offline, and the cache does not say"
    response = getattr(cause, "response", None)
    return f"{type(cause).__name__}" if response is None else f"the Hub answered {response.status_code}"


def check_tokenizer(tokenizer, vocab_size: int):
    """Check that each token of a tokenizer has a row in the table of word embeddings.

    Args:
        tokenizer: the tokenizer of a model.
        vocab_size: number of rows of the table.

    Raises:
        ValueError: a token has none.
    """
    token, number = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if number >= vocab_size:
        raise ValueError(
            f"the tokenizer has the token {token!r} with the number {number}, and the table of word embeddings only "
            f"{vocab_size} rows: resize the table and train it, or take the tokenizer that the model was trained with"
        )


def load_tokenizer(name_or_path: str | os.PathLike, files: Sequence[str] = TOKENIZER_FILES, **options):
    """Load the tokenizer of a model, after making sure which files it has.

    transformers takes each file that it does not get for one that is not there, and would build another tokenizer.

    Args:
        name_or_path: a folder, or the id of a repository on the Hub.
        files: the files that it may have.
        **options: as in `AutoTokenizer.from_pretrained`.

    Returns:
        The tokenizer, None if there is no file of one: transformers would create one without a vocabulary.

    Raises:
        OSError: whether a file exists could not be found out.
    """
    hub = {name: value for name, value in options.items() if name in HUB_OPTIONS}
    found = [find_file(name_or_path, file, **hub) for file in files]
    if not any(found):
        return None
    return AutoTokenizer.from_pretrained(name_or_path, **options)
