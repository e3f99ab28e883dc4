"""Configuration files that are read to the letter: an error names the key, its value and what would be right."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any, Final, TypeVar, get_args, get_origin

import msgspec

T = TypeVar("T", bound=msgspec.Struct)

MAX_SHOWN: Final = 200
_SECRETIVE: Final = re.compile(r"pass|secret|token|key|credential")


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names key, value and what would be right."""


def load_toml(path: Path, kind: type[T]) -> T:
    """Read a file into a struct; raises ConfigError."""
    try:
        return parse_toml(path.read_text("utf-8"), kind)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text") from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def parse_toml(text: str, kind: type[T]) -> T:
    """Parse TOML into a struct; raises ConfigError."""
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"not TOML: {error}") from error
    _check_section(document, kind, "")
    return msgspec.convert(document, kind)


def shown(key: str, value: object) -> str:
    """Return a value as a log may show it: a secret stays out, also one that stands under a wrong key."""
    return "(not shown)" if _SECRETIVE.search(key.lower()) else repr(value)[:MAX_SHOWN]


def _check_section(section: object, kind: type[msgspec.Struct], path: str) -> None:
    if not isinstance(section, dict):
        raise ConfigError(f"`{path.rstrip('.')}` = {shown(path, section)}: a table is right here")
    fields = {field.encode_name: field for field in msgspec.structs.fields(kind)}
    for key, value in section.items():
        if key not in fields:
            right = ", ".join(sorted(fields))
            raise ConfigError(f"unknown key `{path}{key}` = {shown(key, value)}; here one of these is right: {right}")
        _check_value(value, fields[key].type, f"{path}{key}")
    for key, field in fields.items():
        if field.required and key not in section:
            raise ConfigError(f"`{path}{key}` is missing")


def _check_value(value: object, kind: Any, path: str) -> None:
    section = _section_of(kind)
    if section is not None and get_origin(kind) is dict and isinstance(value, dict):
        for name, one in value.items():
            _check_section(one, section, f"{path}.{name}.")
    elif section is not None and get_origin(kind) is list and isinstance(value, list):
        for at, one in enumerate(value):
            _check_section(one, section, f"{path}[{at}].")
    elif section is not None and get_origin(kind) not in {dict, list}:
        _check_section(value, section, f"{path}.")
    else:
        try:
            msgspec.convert(value, kind)
        except msgspec.ValidationError as error:
            reason = str(error).partition(" - at")[0]
            found = shown(path.rpartition(".")[2], value)
            raise ConfigError(f"`{path}` = {found}: {reason[:1].lower()}{reason[1:]}") from error


def _section_of(kind: Any) -> type[msgspec.Struct] | None:
    """Return the section inside an annotation such as `Device`, `Cloud | None` or `dict[str, ModelPolicy]`."""
    for candidate in (kind, *get_args(kind)):
        if isinstance(candidate, type) and issubclass(candidate, msgspec.Struct):
            return candidate
    return None
