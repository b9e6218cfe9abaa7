"""Find the configuration file."""

import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import platformdirs

from mcp_auth_proxy.config.trust import reason_to_distrust
from mcp_auth_proxy.errors import ConfigError, ConfigurationError

APP = "mcp-auth-proxy"
"""The name of the platform's folders."""

FILE_NAME = "mcp-auth-proxy.yaml"
VARIABLE = "MCP_AUTH_PROXY_CONFIG"


class Place(NamedTuple):
    """A configuration file, and whether it is surely meant."""

    path: Path
    is_chosen: bool
    """Whether the user has named it, or put it into the folder for it. False: it is in the current folder, as that of
    a cloned repository is, and may run no program."""


def find(explicit: str | None, environ: Mapping[str, str] = os.environ) -> Path | None:
    """Return the path of ``find_place``."""
    found = find_place(explicit, environ)
    return None if found is None else found.path


def find_place(explicit: str | None, environ: Mapping[str, str] = os.environ) -> Place | None:
    """Return the file to read; None if there is none.

    In order: ``--config``, ``$MCP_AUTH_PROXY_CONFIG``, ``./mcp-auth-proxy.yaml``, the platform's configuration folder.
    Raises ConfigurationError if a file given by flag or variable does not exist, and if others could have put the one
    in the current folder there: it decides where tokens are sent.
    """
    for text, origin in ((explicit, "--config"), (environ.get(VARIABLE), f"${VARIABLE}")):
        if text:
            return Place(_named(text, origin), is_chosen=True)
    here, platform = Path.cwd() / FILE_NAME, platform_file()
    if _is_file(here, str(here)):
        if problem := reason_to_distrust(here):
            refusal = (
                f"{here} was found in the current folder, but {problem}: somebody else may have put it there. "
                f"If it is yours, name it with --config or ${VARIABLE}"
            )
            raise ConfigurationError([ConfigError("", refusal)])
        return Place(here, is_chosen=here == platform)
    if platform is None or not _is_file(platform, str(platform)):
        return None
    return Place(platform, is_chosen=True)


def platform_file() -> Path | None:
    """Return where the platform has this user's configuration; None if the user has no home folder."""
    try:
        return platformdirs.user_config_path(APP, appauthor=False) / FILE_NAME
    except RuntimeError:
        return None


def _named(text: str, origin: str) -> Path:
    """Return the absolute path of a file that a flag or variable names. Raises ConfigurationError if it is none."""
    try:
        path = Path(text).expanduser().absolute()
    except RuntimeError:
        problem = f"{text} (from {origin}) names a home folder that does not exist"
        raise ConfigurationError([ConfigError("", problem)]) from None
    if not _is_file(path, f"{path} (from {origin})"):
        raise ConfigurationError([ConfigError("", f"{path} (from {origin}) does not exist or is not a file")])
    return path


def _is_file(path: Path, shown: str) -> bool:
    """Return whether a file exists. Raises ConfigurationError if this user can't find out."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise ConfigurationError([ConfigError("", f"{shown} can't be read ({error.strerror})")]) from None


def data_folder() -> Path:
    """Return where the platform keeps the data of this user's programs. Raises ConfigurationError if it has no home."""
    try:
        return platformdirs.user_data_path(APP, appauthor=False)
    except RuntimeError:
        problem = "This user has no home folder, where the store would be: set $HOME, or use a configuration file"
        raise ConfigurationError([ConfigError("", problem)]) from None
