"""``service``: the real command with a systemctl that only notes what it is told; systemd itself checks the units."""

import configparser
import os
import plistlib
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from mcp_auth_proxy.app import DRAIN_SECONDS
from mcp_auth_proxy.cli import notify, service

ROOT = os.geteuid() == 0
SYSTEMCTL = """#!/bin/sh
echo "$*" >> "$STATE/calls"
test ! -e "$STATE/fails" || { echo "Failed to connect to bus: No medium found" >&2; exit 1; }
case "$*" in
    *is-active*) test -e "$STATE/active" ;;
    *restart*) touch "$STATE/active" ;;
    *disable*) rm -f "$STATE/active" ;;
esac
"""
CONFIG = "servers: {notes: {url: https://mcp.example.com/mcp}}\n"


@dataclass
class Machine:
    """A home, a systemctl and the command."""

    folder: Path
    config: Path
    prefix: tuple[str, ...] = ()
    python: str = sys.executable

    @property
    def unit(self) -> Path:
        return self.folder / "home/.config/systemd/user/mcp-auth-proxy.service"

    def run(self, *arguments: str, env: Mapping[str, str] | None = None) -> tuple[int, str, str]:
        environ = {
            **os.environ,
            "PATH": f"{self.folder}/bin:{os.environ['PATH']}",
            "HOME": str(self.folder / "home"),
            "STATE": str(self.folder),
            "PYTHONPATH": os.pathsep.join(sys.path),
            "LOGNAME": "ada",
            "XDG_CONFIG_HOME": "",
            **(env or {}),
        }
        command = [*self.prefix, self.python, "-m", "mcp_auth_proxy", "service", *arguments]
        done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60, check=False)
        return done.returncode, done.stdout, done.stderr

    def calls(self) -> list[str]:
        """Return what systemctl was told since the last time."""
        file = self.folder / "calls"
        calls = file.read_text().splitlines() if file.exists() else []
        file.unlink(missing_ok=True)
        return calls


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    (tmp_path / "bin").mkdir()
    (tmp_path / "home").mkdir()
    systemctl = tmp_path / "bin/systemctl"
    systemctl.write_text(SYSTEMCTL)
    systemctl.chmod(0o755)
    config = tmp_path / "proxy.yaml"
    config.write_text(CONFIG)
    # As root the command would install the system's service. Inside of the namespace it is an ordinary user.
    prefix = ("unshare", "--user", "--map-user=1000", "--map-group=1000") if ROOT else ()
    return Machine(tmp_path, config, prefix)


def test_install_starts_the_service_and_a_second_time_changes_nothing(machine: Machine) -> None:
    code, out, err = machine.run("install", "--config", str(machine.config))
    assert (code, err) == (0, "")
    assert str(machine.unit) in out
    assert "enable-linger" in out
    assert machine.calls()[-3:] == [
        "--user daemon-reload",
        "--user enable mcp-auth-proxy.service",
        "--user restart mcp-auth-proxy.service",
    ]
    written = machine.unit.stat().st_mtime_ns

    code, out, _ = machine.run("install", "--config", str(machine.config))
    assert code == 0
    assert "already" in out
    assert machine.calls() == ["--user --quiet is-active mcp-auth-proxy.service"]
    assert machine.unit.stat().st_mtime_ns == written


def test_another_configuration_replaces_the_unit(machine: Machine) -> None:
    machine.run("install", "--config", str(machine.config))
    other = machine.folder / "other folder" / "100%.yaml"
    other.parent.mkdir()
    other.write_text(CONFIG)
    machine.calls()
    assert machine.run("install", "--config", str(other))[0] == 0
    assert machine.calls()[-1] == "--user restart mcp-auth-proxy.service"
    assert f'--config "{other.parent}/100%%.yaml"' in machine.unit.read_text()


@pytest.mark.parametrize("name", ["a\nExecStartPre=id\n.yaml", "a\r.yaml", "a\u2028b.yaml", os.fsdecode(b"\xff.yaml")])
def test_a_name_that_would_be_another_line_of_the_unit_is_refused(machine: Machine, name: str) -> None:
    (config := machine.folder / name).write_text(CONFIG)
    for option in ([], ["--print"]):
        code, out, err = machine.run("install", "--config", str(config), *option)
        assert (code, out, err.count("\n")) == (1, "", 1)
        assert "has a control character in its name, or bytes that are not text: rename it" in err
    assert not machine.unit.exists()


def test_status_tells_not_installed_from_not_running(machine: Machine) -> None:
    code, out, _ = machine.run("status")
    assert (code, "not installed" in out, "service install" in out) == (1, True, True)
    machine.run("install", "--config", str(machine.config))
    code, out, _ = machine.run("status")
    assert (code, "is running" in out) == (0, True)
    (machine.folder / "active").unlink()
    code, out, _ = machine.run("status")
    assert (code, "not running" in out, "journalctl" in out) == (1, True, True)


def test_uninstall_removes_the_unit_and_nothing_else(machine: Machine) -> None:
    machine.run("install", "--config", str(machine.config))
    machine.calls()
    code, out, _ = machine.run("uninstall")
    assert (code, "uninstalled" in out) == (0, True)
    assert not machine.unit.exists()
    assert machine.config.exists()
    assert machine.calls() == ["--user disable --now mcp-auth-proxy.service", "--user daemon-reload"]
    code, out, _ = machine.run("uninstall")
    assert (code, "not installed" in out) == (0, True)


def test_print_writes_nothing_and_calls_nobody(machine: Machine) -> None:
    code, out, _ = machine.run("install", "--print", "--config", str(machine.config))
    assert (code, f"serve --config {machine.config}" in out) == (0, True)
    code, out, _ = machine.run("uninstall", "--print")
    assert (code, out.splitlines()[0]) == (0, "systemctl --user disable --now mcp-auth-proxy.service")
    assert not machine.unit.exists()
    assert machine.calls() == []


def test_without_a_session_the_error_names_the_remedy(machine: Machine) -> None:
    (machine.folder / "fails").touch()
    code, _, err = machine.run("install", "--config", str(machine.config))
    assert code == 1
    assert err.startswith("error: `systemctl --user daemon-reload` failed: Failed to connect to bus")
    assert "loginctl enable-linger" in err


def test_a_machine_without_systemd_is_told_of_print(machine: Machine) -> None:
    (machine.folder / "bin/systemctl").unlink()
    (machine.folder / "bin/unshare").symlink_to(shutil.which("unshare") or "/usr/bin/unshare")
    code, _, err = machine.run("install", "--config", str(machine.config), env={"PATH": str(machine.folder / "bin")})
    assert (code, "service install --print" in err) == (1, True)
    assert not machine.unit.exists()


def test_a_faulty_configuration_is_not_installed(machine: Machine) -> None:
    machine.config.write_text("servers: {notes: {url: nonsense}}\n")
    code, _, err = machine.run("install", "--config", str(machine.config))
    assert (code, "servers.notes.url" in err) == (2, True)
    assert not machine.unit.exists()


@pytest.mark.skipif(not ROOT, reason="the system's service is installed by root")
def test_the_service_of_the_system_says_what_its_configuration_lacks(machine: Machine) -> None:
    """In a mount namespace, with an empty /etc, and with Python and the command in /mnt."""
    etc = "mount -t tmpfs none /etc && mkdir -p /etc/mcp-auth-proxy && cp {} /etc/mcp-auth-proxy/config.yaml && {}"
    mnt = (
        "mount -t tmpfs none /mnt && mkdir /mnt/bin /mnt/python && cp /bin/true /mnt/bin/mcp-auth-proxy && "
        f"mount --bind {sys.base_prefix} /mnt/python && "
    )
    key = "touch /etc/mcp-auth-proxy/store.key && "
    path = f"{machine.folder}/bin:/mnt/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    machine.python = f"/mnt/python/bin/python{sys.version_info[0]}.{sys.version_info[1]}"

    def install(prepare: str) -> tuple[int, str, str]:
        script = mnt + etc.format(machine.config, prepare) + 'exec "$@"'
        machine.prefix = ("unshare", "--mount", "sh", "-c", script, "sh")
        return machine.run("install", "--config", "/etc/mcp-auth-proxy/config.yaml", env={"PATH": path})

    code, _, err = install("chmod 600 /etc/mcp-auth-proxy/config.yaml && ")
    assert code == 2
    assert "which can't read this file: chmod a+r /etc/mcp-auth-proxy/config.yaml" in err
    code, _, err = install("")
    assert code == 2
    assert "store.url: the service can write to /var/lib/mcp-auth-proxy only" in err
    assert "store.keys: the service gets its key from /etc/mcp-auth-proxy/store.key" in err
    machine.config.write_text(
        "store: {url: 'sqlite:////var/lib/mcp-auth-proxy/mcp-auth-proxy.db',"
        " keys: ['file:/run/credentials/mcp-auth-proxy.service/store-key']}\n" + CONFIG
    )
    code, out, err = install(key)
    assert (code, err.startswith("warning: The store key /etc/mcp-auth-proxy/store.key ")) == (0, True)
    assert err.endswith("can be read or written by others (mode 0644): chmod 600 /etc/mcp-auth-proxy/store.key\n")
    key += "chmod 600 /etc/mcp-auth-proxy/store.key && "
    hide = "mount -t tmpfs none /var/tmp && mv /mnt/bin/mcp-auth-proxy /var/tmp && PATH=$PATH:/var/tmp && "
    code, out, err = install(key + hide)
    assert (code, err.startswith("warning: The service can't see /var/tmp/mcp-auth-proxy: install ")) == (0, True)
    code, out, err = install(key)
    assert (code, err) == (0, "")
    assert "/etc/systemd/system/mcp-auth-proxy.service" in out
    assert machine.calls()[-3:] == [
        "daemon-reload",
        "enable mcp-auth-proxy.service",
        "restart mcp-auth-proxy.service",
    ]


def test_a_program_that_the_system_service_cannot_see_is_named() -> None:
    assert service.hidden_program(Path("/opt/mcp-auth-proxy")) == ""
    for place in ("/root/.local/share/pipx/venvs/mcp-auth-proxy", "/home/ada/venv", "/tmp/venv"):
        assert service.hidden_program(Path(place)).startswith(f"The service can't see {place}, where the program is")


def unit(folder: Path, found: service.Manager) -> Path:
    """Return the unit that a real machine would have, with a program that exists."""
    file = folder / "mcp-auth-proxy.service"
    file.write_text(service.unit_text(found, Path("/etc/mcp-auth-proxy/config.yaml")))
    return file


@pytest.mark.systemd
@pytest.mark.parametrize("system", [False, True], ids=["user", "system"])
def test_systemd_accepts_the_unit(tmp_path: Path, system: bool) -> None:
    scope = "--system" if system else "--user"
    command = ["systemd-analyze", scope, "verify", str(unit(tmp_path, service.systemd(system=system)))]
    env = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=env, check=False)
    assert done.returncode == 0, done.stderr
    assert "mcp-auth-proxy.service" not in done.stderr


COMMON = {
    "Service.Type": "notify",
    "Service.ExecReload": "/bin/kill -HUP $MAINPID",
    "Service.Restart": "on-failure",
    "Service.RestartSec": "5s",
    "Service.RestartPreventExitStatus": "2",
    "Service.TimeoutStopSec": "45s",
    "Service.UMask": "0077",
    "Service.NoNewPrivileges": "yes",
    "Service.LimitCORE": "0",
}
USERS = {**COMMON, "Install.WantedBy": "default.target"}
SYSTEMS = {
    **COMMON,
    "Install.WantedBy": "multi-user.target",
    "Service.DynamicUser": "yes",
    "Service.StateDirectory": "mcp-auth-proxy",
    "Service.StateDirectoryMode": "0700",
    "Service.LoadCredential": "store-key:/etc/mcp-auth-proxy/store.key",
}


@pytest.mark.parametrize(("system", "promised"), [(False, USERS), (True, SYSTEMS)], ids=["user", "system"])
def test_the_unit_says_when_it_starts_restarts_and_stops(
    tmp_path: Path, system: bool, promised: dict[str, str]
) -> None:
    reader = configparser.RawConfigParser(strict=False)
    reader.optionxform = str  # type: ignore[assignment, method-assign]
    reader.read_string(unit(tmp_path, service.systemd(system=system)).read_text())
    found = {f"{section}.{key}": value for section in reader.sections() for key, value in reader[section].items()}
    assert {key: found.get(key) for key in promised} == promised
    assert found["Service.ExecStart"].endswith("/mcp-auth-proxy serve --config /etc/mcp-auth-proxy/config.yaml")
    # Running requests get their time.
    assert int(found["Service.TimeoutStopSec"].rstrip("s")) > DRAIN_SECONDS


@pytest.mark.systemd
def test_the_unit_of_the_system_is_hardened(tmp_path: Path) -> None:
    file = unit(tmp_path, service.systemd(system=True))
    command = ["systemd-analyze", "security", "--offline=true", "--threshold=25", "--no-pager", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout[-300:]


@pytest.mark.systemd
def test_systemd_reads_the_path_of_the_program_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder := tmp_path / "a$b %h {config}").mkdir()
    for name in ("python", "mcp-auth-proxy"):
        shutil.copy("/bin/true", folder / name)
    monkeypatch.setattr(sys, "executable", str(folder / "python"))
    command = ["systemd-analyze", "--user", "verify", str(unit(tmp_path, service.systemd(system=False)))]
    env = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=env, check=False)
    assert (done.returncode, "mcp-auth-proxy" in done.stderr) == (0, False), done.stderr


def test_a_path_is_not_taken_for_a_place_in_the_file() -> None:
    text = service.unit_text(service.launchd(system=False), Path("/Users/ada/{log} {program}.yaml"))
    assert plistlib.loads(text.encode())["ProgramArguments"][3] == "/Users/ada/{log} {program}.yaml"


def test_the_plist_of_launchd_keeps_it_running() -> None:
    text = service.unit_text(service.launchd(system=False), Path("/Users/ada/a & b.yaml"))
    plist = plistlib.loads(text.encode())
    assert plist["ProgramArguments"][1:] == ["serve", "--config", "/Users/ada/a & b.yaml"]
    assert plist["ProgramArguments"][0].endswith("/mcp-auth-proxy")
    assert (plist["Label"], plist["RunAtLoad"], plist["KeepAlive"]) == ("mcp-auth-proxy", True, True)
    assert (plist["ThrottleInterval"], plist["Umask"]) == (5, 0o077)
    assert plist["ExitTimeOut"] > DRAIN_SECONDS
    assert plist["StandardErrorPath"].endswith(".log")


@pytest.mark.parametrize(
    ("file", "template"),
    [
        ("systemd/mcp-auth-proxy.user.service", "user.service"),
        ("systemd/mcp-auth-proxy.service", "system.service"),
        ("launchd/mcp-auth-proxy.plist", "launchd.plist"),
    ],
)
def test_the_files_to_copy_are_those_that_the_command_writes(file: str, template: str) -> None:
    project = Path(__file__).resolve().parents[2]
    copy = (project / "deploy" / file).read_text().splitlines()
    source = (project / "src/mcp_auth_proxy/cli/units" / template).read_text().splitlines()
    assert len(copy) == len(source)
    assert all(ours == line or "{" in line for ours, line in zip(copy, source, strict=True))


@pytest.mark.parametrize("abstract", [False, True])
def test_the_service_manager_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, abstract: bool) -> None:
    name = f"@mcp-auth-proxy-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind("\0" + name[1:] if abstract else name)
        monkeypatch.setenv("NOTIFY_SOCKET", name)
        notify.notify(notify.READY)
        assert manager.recv(100) == b"READY=1"
    notify.notify(notify.STOPPING)
