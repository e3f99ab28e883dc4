"""Configuration files that are read to the letter: an error names the key, its value and what would be right."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import msgspec

T = TypeVar("T", bound=msgspec.Struct)


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names key, value and what would be right."""


def load_toml(path: Path, kind: type[T]) -> T:
    """Read a file into a struct; raises ConfigError."""
    try:
        return parse_toml(path.read_text("utf-8"), kind)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except (ConfigError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from error


def parse_toml(text: str, kind: type[T]) -> T:
    """Parse TOML into a struct; raises ConfigError."""
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"is not TOML: {error}") from error
    _check_section(document, kind, "")
    return msgspec.convert(document, kind)


def _check_section(section: object, kind: type[msgspec.Struct], path: str) -> None:
    if not isinstance(section, dict):
        raise ConfigError(f"`{path.rstrip('.')}` = {section!r}: a table is right here")
    fields = {field.encode_name: field for field in msgspec.structs.fields(kind)}
    for key, value in section.items():
        if key not in fields:
            raise ConfigError(f"`{path}{key}` = {value!r}: is unknown; right here are {', '.join(sorted(fields))}")
        _check_value(value, fields[key].type, f"{path}{key}")
    for key, field in fields.items():
        if field.required and key not in section:
            raise ConfigError(f"`{path}{key}` is missing")


def _check_value(value: object, kind: Any, path: str) -> None:
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        _check_section(value, kind, f"{path}.")
        return
    inner = get_args(kind)
    if get_origin(kind) is dict and isinstance(value, dict) and issubclass(inner[1], msgspec.Struct):
        for name, section in value.items():
            _check_section(section, inner[1], f"{path}.{name}.")
        return
    try:
        msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise ConfigError(f"`{path}` = {value!r}: {str(error).partition(' - at')[0]}") from error
