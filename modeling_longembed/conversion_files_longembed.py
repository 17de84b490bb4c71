"""The settings in the files beside a checkpoint, of which those that nobody reads are refused.

A key that is in none of the tables may only have a value that switches something off. A setting of a later release that
shapes a vector is then refused by name, and not lost.
"""

import json
from pathlib import Path

from .conversion_families_longembed import OFF, refuse
from .hub_files_longembed import find_file

# The values of a key that is taken over, or that has no effect on a vector.
ANY = object()


def read_text(name_or_path: str, file: str, errors: str = "strict", **hub) -> str | None:
    """Return the text of a file in a model folder or Hub repository; None if there is no such file.

    Args:
        name_or_path: the folder, or the id of the repository.
        file: the path of the file in it; a byte order mark is left out.
        errors: `replace` reads bytes that are not UTF-8 as question marks; `strict` raises.
        **hub: as for `find_file`.

    Returns:
        The text.
    """
    path = find_file(name_or_path, file, **hub)
    return None if path is None else Path(path).read_text(encoding="utf-8-sig", errors=errors)


def read_settings(name_or_path: str, file: str, keys: dict, **hub) -> dict | None:
    """Return the settings in a JSON file; None if there is no such file.

    Args:
        name_or_path: Hub id or folder.
        file: name of the file in it.
        keys: the values that are accepted, for each key.
        **hub: options of `from_pretrained` to find files.

    Raises:
        ValueError: the file is no JSON object, or a key has a value that is not accepted.
    """
    text = read_text(name_or_path, file, **hub)
    if text is None:
        return None
    try:
        settings = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{file} of {name_or_path} is not valid JSON: {error}; download it again") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{file} of {name_or_path} is not a JSON object; download it again")
    check_settings(file, settings, keys)
    return settings


def check_settings(file: str, settings: dict, keys: dict):
    """Refuse the keys of a file that have a value that is not accepted.

    Args:
        file: where the settings are from, for the message.
        settings: the settings.
        keys: the values that are accepted, for each key; for all other keys only those in `OFF` are.

    Raises:
        ValueError: a key has another value.
    """
    for key, value in settings.items():
        accepted = keys.get(key, OFF)
        refuse(accepted is not ANY and value not in accepted, f"{key}={json.dumps(value)} in {file}")
