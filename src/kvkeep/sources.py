"""Reads the settings from where people write them into one `Config`.

Sources, the stronger first: the command line or vLLM's `kv_connector_extra_config`, a TOML file, KVKEEP_* variables.
Every source is checked in full, also where a stronger source overrides it: a wrong value in a weaker source is found
at the start, not on the day when the stronger one goes.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from kvkeep.config import Config, check_setting, check_tiers_once
from kvkeep.errors import ConfigError
from kvkeep.settings import unknown, wrong

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_PREFIX: Final = "KVKEEP_"
_FILE_KEY: Final = "config_file"
_FILE_VARIABLE: Final = "KVKEEP_CONFIG_FILE"


class _Setting(NamedTuple):
    """A checked value, and where it is written, as an error names it."""

    value: object
    written: str


def read_text(path: str) -> str:
    """Read a configuration file; OSError or UnicodeDecodeError where that fails."""
    return Path(path).read_text(encoding="utf-8")


def load_config(
    overrides: Mapping[str, object],
    environ: Mapping[str, str],
    read: Callable[[str], str] = read_text,
    *,
    command_line: bool = False,
) -> Config:
    """Merge the sources into one Config.

    `overrides` is vLLM's mapping or, with `command_line`, the options (text) that were set; `environ` is the whole
    environment; `read` reads the file that `overrides["config_file"]` or KVKEEP_CONFIG_FILE names. Raise ConfigError
    for an unknown name, a wrong value or an unreadable file: it names the setting as it is written there, and the cure.
    """
    settings = _from_environ(environ)
    file = overrides.get(_FILE_KEY, environ.get(_FILE_VARIABLE))
    if file is not None:
        if not isinstance(file, str) or not file:
            raise wrong(_override(_FILE_KEY, command_line), file, "the path of a TOML file")
        settings |= _from_file(file, read)
    settings |= _from_overrides(overrides, command_line)
    check_tiers_once({name: setting.value for name, setting in settings.items()}, lambda name: settings[name].written)
    return Config(**{name: setting.value for name, setting in settings.items()})  # type: ignore[arg-type]


def _from_environ(environ: Mapping[str, str]) -> dict[str, _Setting]:
    names = {_PREFIX + name.upper(): name for name in Config.__struct_fields__}
    settings = {}
    for variable, text in environ.items():
        if not variable.startswith(_PREFIX) or variable == _FILE_VARIABLE:
            continue
        if variable not in names:
            raise unknown(variable, variable, (*names, _FILE_VARIABLE))
        value = check_setting(names[variable], text, variable, from_text=True)
        settings[names[variable]] = _Setting(value, variable)
    return settings


def _from_file(file: str, read: Callable[[str], str]) -> dict[str, _Setting]:
    try:
        found = tomllib.loads(read(file))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: the configuration file cannot be read: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{file}: not TOML: {error}") from error
    for name, value in found.items():
        if isinstance(value, dict):
            right = "only [[tiers]] are tables, every other setting stands alone: chunk_tokens = 256"
            raise ConfigError(f"{file}: [{name}] is a table; {right}")
    return {name: _checked(name, value, f"{file}: {name}") for name, value in found.items()}


def _from_overrides(overrides: Mapping[str, object], command_line: bool) -> dict[str, _Setting]:
    return {
        name: _checked(name, value, _override(name, command_line), from_text=command_line)
        for name, value in overrides.items()
        if name != _FILE_KEY
    }


def _override(name: str, command_line: bool) -> str:
    """A setting as it is written on a command line, or in vLLM's mapping."""
    if command_line:
        return "--config" if name == _FILE_KEY else f"--{name.replace('_', '-')}"
    return f"kv_connector_extra_config.{name}"


def _checked(name: str, value: object, written: str, *, from_text: bool = False) -> _Setting:
    if name not in Config.__struct_fields__:
        raise unknown(written, name, Config.__struct_fields__)
    return _Setting(check_setting(name, value, written, from_text=from_text), written)
