"""``service``: run the proxy as a systemd or launchd service, of the user or, as root, of the system."""

import getpass
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from xml.sax.saxutils import escape

from mcp_auth_proxy.cli.terminal import complain, say
from mcp_auth_proxy.config import load as config
from mcp_auth_proxy.config.document import located, parse
from mcp_auth_proxy.errors import ConfigError, ConfigurationError, McpAuthProxyError
from mcp_auth_proxy.store.files import exposure

NAME = "mcp-auth-proxy"
STATE_FOLDER = Path("/var/lib/mcp-auth-proxy")
"""Where the system service may write (StateDirectory)."""

KEY_FILE = Path("/etc/mcp-auth-proxy/store.key")
"""The key that the system service gets as a credential (LoadCredential)."""

CREDENTIALS = Path("/run/credentials/mcp-auth-proxy.service")
"""Where it finds its credentials."""

_HIDDEN = (Path("/home"), Path("/root"), Path("/run/user"), Path("/tmp"), Path("/var/tmp"))
"""Folders that the system service can't see (ProtectHome, PrivateTmp)."""

_TIMEOUT = 60
"""Seconds that systemctl or launchctl may take."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Manager:
    """A service manager: where its file is, and the commands that it takes."""

    template: str
    path: Path
    check: Sequence[str]
    """Exits with 0 if the service is active."""
    start: Sequence[Sequence[str]]
    """The commands that make it active with the file as it is now."""
    stop: Sequence[Sequence[str]]
    after_removal: Sequence[Sequence[str]] = ()
    log: str


def systemd(*, system: bool) -> Manager:
    """Return how systemd runs the service."""
    unit = f"{NAME}.service"
    configured = os.environ.get("XDG_CONFIG_HOME", "")
    home = Path(configured) if configured.startswith("/") else _home() / ".config"
    systemctl = ["systemctl"] if system else ["systemctl", "--user"]
    return Manager(
        template="system.service" if system else "user.service",
        path=(Path("/etc/systemd/system") if system else home / "systemd/user") / unit,
        check=[*systemctl, "--quiet", "is-active", unit],
        start=[[*systemctl, "daemon-reload"], [*systemctl, "enable", unit], [*systemctl, "restart", unit]],
        stop=[[*systemctl, "disable", "--now", unit]],
        after_removal=[[*systemctl, "daemon-reload"]],
        log=f"journalctl {'--unit' if system else '--user-unit'} {unit}",
    )


def launchd(*, system: bool) -> Manager:
    """Return how launchd runs the service."""
    folder = Path("/Library/LaunchDaemons") if system else _home() / "Library/LaunchAgents"
    path = folder / f"{NAME}.plist"
    domain = "system" if system else f"gui/{os.getuid()}"
    return Manager(
        template="launchd.plist",
        path=path,
        check=["launchctl", "print", f"{domain}/{NAME}"],
        start=[["launchctl", "bootstrap", domain, str(path)]],
        stop=[["launchctl", "bootout", f"{domain}/{NAME}"]],
        log=f"tail {_launchd_log(system=system)}",
    )


def manager() -> Manager:
    """Return the service manager of this machine, for the system if this process is root's."""
    system = os.geteuid() == 0
    return launchd(system=system) if sys.platform == "darwin" else systemd(system=system)


def unit_text(found: Manager, config_file: Path) -> str:
    """Return the file of the service. Raises McpAuthProxyError if a path can't be written in it."""
    text = (resources.files("mcp_auth_proxy.cli") / "units" / found.template).read_text("utf-8")
    binary, config = _writable(program()), _writable(config_file)
    if found.template.endswith(".plist"):
        log = _launchd_log(system=os.geteuid() == 0)
        values = {"{program}": escape(binary), "{config}": escape(config), "{log}": escape(str(log))}
    else:
        # $ begins a variable in arguments only (systemd.service(5)).
        values = {"{program}": _quoted(binary), "{config}": _quoted(config.replace("$", "$$"))}
    return re.sub(r"\{\w+\}", lambda name: values[name[0]], text)


def install(config_file: Path, *, print_only: bool, programs: bool = True) -> int:
    """Write the file of the service, and start it. Return the exit code; raise McpAuthProxyError.

    If the file is there already and the service is active, nothing is done.
    """
    found = manager()
    text = unit_text(found, config_file)
    if print_only:
        say(*text.rstrip("\n").split("\n"))
        return 0
    errors = _config_errors(config_file, programs=programs)
    if found.template == "system.service":
        errors += _system_errors(config_file)
    if errors:
        raise ConfigurationError(located(errors, config_file), str(config_file))
    if found.template == "system.service":
        complain(*(f"warning: {warning}" for warning in _system_warnings()))
    _require_program(found)
    if _installed(found) == text and _succeeds(found.check):
        say(f"{NAME} is installed and running already: {found.path}")
        return 0
    running = _installed(found) is not None and _succeeds(found.check)
    _write(found.path, text)
    if running and found.template == "launchd.plist":
        _run(found.stop, found)
    _run(found.start, found)
    say(f"{NAME} is installed and running: {found.path}", f"Its log: {found.log}")
    if found.template == "user.service":
        say(f"To start it at boot, before you log in: loginctl enable-linger {getpass.getuser()}")
    return 0


def uninstall(*, print_only: bool) -> int:
    """Stop the service and delete its file. Return the exit code; raise McpAuthProxyError. Nothing else is deleted."""
    found = manager()
    if print_only:
        commands = [*found.stop, ["rm", str(found.path)], *found.after_removal]
        say(*map(shlex.join, commands))
        return 0
    if _installed(found) is None:
        say(f"{NAME} is not installed: there is no {found.path}")
        return 0
    _require_program(found)
    if found.template != "launchd.plist" or _succeeds(found.check):
        _run(found.stop, found)
    try:
        found.path.unlink()
    except OSError as error:
        raise McpAuthProxyError(f"{found.path} can't be deleted: {error.strerror}.") from None
    _run(found.after_removal, found)
    say(f"{NAME} is uninstalled. Its configuration and its store are still there.")
    return 0


def status() -> int:
    """Print whether the service is installed and active. Return 0 if it is active, else 1."""
    found = manager()
    if _installed(found) is None:
        say(f"{NAME} is not installed: there is no {found.path}. Install it with: {NAME} service install")
        return 1
    _require_program(found)
    if not _succeeds(found.check):
        say(f"{NAME} is installed, but not running. Its log: {found.log}")
        return 1
    say(f"{NAME} is running: {found.path}")
    return 0


def _config_errors(config_file: Path, *, programs: bool) -> list[ConfigError]:
    """Return what is wrong with the configuration, apart from credentials that exist only inside of the service."""
    try:
        config.load(config_file, environ=os.environ, allow_anonymous=False, secrets_of=(), programs=programs)
    except ConfigurationError as error:
        return [problem for problem in error.errors if str(CREDENTIALS) not in problem.problem]
    return []


def _system_errors(config_file: Path) -> list[ConfigError]:
    """Return what the system service could not see, write or start without."""
    errors = []
    if _is_hidden(config_file):
        problem = "the service can't see files of users or in /tmp: move it to /etc/mcp-auth-proxy/config.yaml"
        errors.append(ConfigError("", problem))
    elif not _is_open(config_file):
        problem = f"the service has a user of its own, which can't read this file: chmod a+r {config_file}"
        errors.append(ConfigError("", problem))
    content = parse(config_file.read_bytes()).content
    store = content.get("store") if isinstance(content, Mapping) else None
    url = store.get("url") if isinstance(store, Mapping) else None
    if not str(url).startswith((f"sqlite:///{STATE_FOLDER}/", "postgresql://", "postgres://", "env:", "file:")):
        problem = f"the service can write to {STATE_FOLDER} only: use sqlite:///{STATE_FOLDER}/mcp-auth-proxy.db"
        errors.append(ConfigError("store.url", problem))
    if not KEY_FILE.exists():
        problem = (
            f"the service gets its key from {KEY_FILE}, which does not exist: make one with: "
            f"(umask 077; openssl rand -base64 32 > {KEY_FILE}), and set keys: [file:{CREDENTIALS}/store-key]"
        )
        errors.append(ConfigError("store.keys", problem))
    return errors


def _system_warnings() -> list[str]:
    """Return what is dangerous or suspicious about the files of the system service."""
    warnings = []
    if problem := exposure(KEY_FILE.stat()):
        warnings.append(f"The store key {KEY_FILE} {problem}: chmod 600 {KEY_FILE}")
    if hidden := next(filter(_is_hidden, (program(), Path(sys.base_prefix))), None):
        warnings.append(f"The service can't see {hidden}: install the program for all users (pipx install --global .).")
    return warnings


def _is_hidden(path: Path) -> bool:
    return any(place.is_relative_to(folder) for place in (path, path.resolve()) for folder in _HIDDEN)


def _is_open(file: Path) -> bool:
    """Return whether every user can read a file, and pass through its folders."""
    real = file.resolve()
    return bool(real.stat().st_mode & stat.S_IROTH) and all(
        folder.stat().st_mode & stat.S_IXOTH for folder in real.parents
    )


def program() -> Path:
    """Return the command of this installation, absolute."""
    beside = Path(sys.executable).with_name(NAME)
    if beside.exists():
        return beside
    found = shutil.which(NAME)
    if found is None:
        raise McpAuthProxyError(f"The command {NAME} was found neither beside {sys.executable} nor in $PATH.")
    return Path(found).absolute()


def _launchd_log(*, system: bool) -> Path:
    return Path("/var/log/mcp-auth-proxy.log") if system else _home() / "Library/Logs/mcp-auth-proxy.log"


def _home() -> Path:
    try:
        return Path.home()
    except RuntimeError:
        raise McpAuthProxyError("This user has no home folder, where its services are: set $HOME.") from None


def _writable(path: Path) -> str:
    """Return a path as text. Raises McpAuthProxyError if a line break in it would begin a line of the file."""
    text = str(path)
    if any(unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") for character in text):
        raise McpAuthProxyError(f"{text} has a control character in its name, or bytes that are not text: rename it.")
    return text


def _quoted(text: str) -> str:
    """Return a word as systemd.service(5) reads it: % is doubled, and quotes keep spaces."""
    text = text.replace("%", "%%")
    if not set(text) & set(" \t\"'\\;"):
        return text
    return '"{}"'.format(text.replace("\\", "\\\\").replace('"', '\\"'))


def _installed(found: Manager) -> str | None:
    """Return the installed file; None if there is none."""
    try:
        return found.path.read_text("utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise McpAuthProxyError(f"{found.path} can't be read: {error}.") from None


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")
    except OSError as error:
        raise McpAuthProxyError(f"{path} can't be written: {error.strerror}.") from None


def _require_program(found: Manager) -> None:
    program = found.check[0]
    if shutil.which(program) is None:
        raise McpAuthProxyError(
            f"{program} was not found on this machine. `{NAME} service install --print` shows the file of the service, "
            f"for you to install it."
        )


def _succeeds(command: Sequence[str]) -> bool:
    try:
        return subprocess.run(command, capture_output=True, timeout=_TIMEOUT, check=False).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def _run(commands: Sequence[Sequence[str]], found: Manager) -> None:
    for command in commands:
        line = " ".join(command)
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT, check=False)
        except subprocess.TimeoutExpired:
            raise McpAuthProxyError(f"`{line}` took more than {_TIMEOUT} seconds. The log: {found.log}") from None
        if done.returncode != 0:
            said = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
            remedy = _remedy(done.stderr) or f"The log: {found.log}"
            if found.template == "system.service" and list(command) in found.start:
                remedy = hidden_program(Path(sys.prefix)) + remedy
            raise McpAuthProxyError(f"`{line}` failed: {said}. {remedy}")


def hidden_program(place: Path) -> str:
    """Return a sentence for a program that is installed where the service of the system can't see it; else nothing."""
    if not _is_hidden(place):
        return ""
    return (
        f"The service can't see {place}, where the program is: install it outside of home folders and /tmp, for "
        f"example with: python3 -m venv /opt/{NAME} && /opt/{NAME}/bin/pip install . "
    )


def _remedy(stderr: str) -> str:
    if "bus" not in stderr:
        return ""
    return (
        "There is no session of this user to run services in: log in as the user directly, and not with su or sudo, or "
        f"run: loginctl enable-linger {getpass.getuser()}"
    )
