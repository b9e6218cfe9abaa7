"""The commands of the documentation that need a daemon, a cluster or a registry: they check their arguments instead.

Each is run as ``deploy_commands.py NAME ARGUMENT…`` in the folder of a clone, by a script of that name on the PATH. It
compares what it is told with the real files, and exits with 2 and a line on stderr if they do not fit.
"""

import argparse
import base64
import os
import re
import shutil
import stat
import sys
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import click
import yaml

from mcp_auth_proxy import __version__
from mcp_auth_proxy.cli.main import cli

UNIT = "mcp-auth-proxy"
DRAIN_SECONDS = 30
BUILT = Path(".built")
"""The image that ``docker build`` has made."""


def require(condition: object, problem: str) -> None:
    """End the command, unless the condition holds."""
    if not condition:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)


def parser(*flags: str, switches: Sequence[str] = (), repeated: Sequence[str] = ()) -> argparse.ArgumentParser:
    """Return a parser of exactly these options, each with a value unless it is a switch."""
    made = argparse.ArgumentParser(allow_abbrev=False, exit_on_error=True)
    for flag in flags:
        made.add_argument(flag)
    for flag in switches:
        made.add_argument(flag, action="store_true")
    for flag in repeated:
        made.add_argument(flag, action="append", default=[])
    return made


def document(path: str | Path) -> Any:
    """Return a YAML file as it is."""
    return yaml.safe_load(Path(path).read_text())


def file_references(text: str) -> set[str]:
    """Return the absolute paths that a configuration takes secrets from."""
    return set(re.findall(r"\bfile:(/[\w./-]+)", text))


# Docker


def docker(arguments: list[str]) -> None:
    """``build``, ``run`` and ``compose up``."""
    match arguments:
        case ["build", *rest]:
            _docker_build(rest)
        case ["run", *rest]:
            _docker_run(rest)
        case ["compose", "up", *rest]:
            options = parser(switches=["--detach", "--build"]).parse_args(rest)
            require(options.build and options.detach, "compose builds the image, and gives the terminal back")
            _compose()
        case _:
            require(False, f"docker does not know {arguments}")


def _docker_build(arguments: list[str]) -> None:
    made = parser("--tag", repeated=["--build-arg"])
    made.add_argument("context")
    options = made.parse_args(arguments)
    text = (Path(options.context) / "Dockerfile").read_text()
    for pair in options.build_arg:
        name, _, value = pair.partition("=")
        require(re.search(rf"^ARG {name}\b", text, re.MULTILINE), f"the Dockerfile takes no {name}")
        require(value, f"{name} is empty")
    require(options.tag == f"mcp-auth-proxy:{__version__}", f"{options.tag} is not this version")
    BUILT.write_text(options.tag)


def _docker_run(arguments: list[str]) -> None:
    made = parser("--name", "--stop-timeout", "--cap-drop", switches=["--detach", "--read-only"], repeated=["-p", "-v"])
    made.add_argument("image")
    options = made.parse_args(arguments)
    require(BUILT.read_text() == options.image, f"{options.image} was not built")
    require(options.detach and options.read_only and options.cap_drop == "ALL", "it has too many rights")
    _check_runtime(options.p, options.v, options.stop_timeout, ())


def _compose() -> None:
    (service,) = document("compose.yaml")["services"].values()
    require((Path(service["build"]) / "Dockerfile").is_file(), "there is nothing to build")
    require(service["read_only"] and service["cap_drop"] == ["ALL"], "it has too many rights")
    secrets = document("compose.yaml")["secrets"]
    files = [f"{secrets[name]['file']}:/run/secrets/{name}" for name in service["secrets"]]
    volumes = document("compose.yaml")["volumes"]
    _check_runtime(service["ports"], service["volumes"] + files, service["stop_grace_period"].rstrip("s"), volumes)


def _check_runtime(ports: list[str], mounts: list[str], timeout: str, volumes: Sequence[str]) -> None:
    """Check what a container gets against the Dockerfile and the configuration in it."""
    dockerfile = Path("Dockerfile").read_text()
    (port,) = ports
    require(port.startswith("127.0.0.1:"), f"{port} is published to everybody")
    require(f"EXPOSE {port.rpartition(':')[2]}\n" in dockerfile, f"nothing listens on {port}")
    require(int(timeout) > DRAIN_SECONDS, "running requests are cut off")
    targets: dict[str, str] = {}
    for mount in mounts:
        source, target = mount.removesuffix(":ro").split(":")
        targets[target] = source
        if source.startswith("."):
            _check_readable(Path(source))
        else:
            require(not volumes or source in volumes, f"the volume {source} is not declared")
            require(f"VOLUME {target}\n" in dockerfile, f"{target} is no volume of the image")
    config = re.search(r"\bMCP_AUTH_PROXY_CONFIG=(\S+)", dockerfile)
    assert config
    require(config[1] in targets, f"{config[1]} is not mounted")
    for path in file_references(Path(targets[config[1]]).read_text()):
        require(path in targets, f"{path} is not mounted")


def _check_readable(source: Path) -> None:
    """Check that the image's user can read a mounted file: the folders above it are not looked at in a container."""
    require(source.is_file(), f"{source} is not a file")
    require(source.stat().st_mode & stat.S_IROTH, f"the image's user can't read {source}")


# Kubernetes


def kubectl(arguments: list[str]) -> None:
    """``create secret generic``: the keys of the Secret are those that manifest and chart mount.

    ``exec`` runs a command that the program has, in a container of the manifest; ``port-forward`` leads to its port.
    """
    match arguments:
        case ["exec", *rest]:
            _kubectl_exec([each for each in rest if each != "-it"])
            return
        case ["port-forward", "deploy/agent", ports]:
            manifest = Path("deploy/kubernetes/sidecar.yaml").read_text()
            require(f":{ports.rpartition(':')[2]}\n" in manifest, f"nothing listens at {ports}")
            return
    require(arguments[:3] == ["create", "secret", "generic"], f"kubectl does not know {arguments}")
    made = parser(repeated=["--from-literal"])
    made.add_argument("name")
    options = made.parse_args(arguments[3:])
    values = dict(pair.split("=", 1) for pair in options.from_literal)
    require(all(values.values()), "a secret is empty")
    require(len(base64.b64decode(values["store-key"], validate=True)) == 32, "the store's key is not 32 bytes")
    replicas = Path("deploy/helm/examples/replicas.yaml").read_text()
    if "database-url" in values:
        wanted = {"store-key"} | {Path(path).name for path in file_references(replicas)}
        require(values.keys() == wanted, f"the example of replicas wants {sorted(wanted)}")
        require(f"secretName: {options.name}\n" in replicas, f"the example mounts no Secret {options.name}")
        return
    manifest = Path("deploy/kubernetes/sidecar.yaml").read_text()
    require(f"secretName: {options.name}," in manifest, f"the manifest mounts no Secret {options.name}")
    mounted = {Path(path).name for path in file_references(manifest)}
    require(values.keys() == mounted, f"the manifest wants {sorted(mounted)}")
    example = Path("deploy/helm/examples/sidecar.yaml").read_text()
    require(f"secretName: {options.name}\n" in example, f"the chart mounts no Secret {options.name}")
    require({Path(path).name for path in file_references(example)} <= mounted, "the chart's example wants more")


def _kubectl_exec(arguments: list[str]) -> None:
    require(arguments[:2] == ["deploy/agent", "-c"], f"kubectl does not know {arguments}")
    manifest = Path("deploy/kubernetes/sidecar.yaml").read_text()
    require(f"- name: {arguments[2]}\n" in manifest, f"there is no container {arguments[2]}")
    require(arguments[3:5] == ["--", "mcp-auth-proxy"], f"the image has no program {arguments[3:]}")
    command = cli.commands[arguments[5]]
    command.make_context(arguments[5], arguments[6:])


def helm(arguments: list[str]) -> None:
    """``install``: the real program renders the chart with the same arguments."""
    require(arguments[0] == "install", f"helm does not know {arguments}")
    program = os.environ["HELM"]
    os.execv(program, [program, "template", *arguments[1:]])


# Services


def systemctl(arguments: list[str]) -> None:
    """Commands for our unit, which is then active or not."""
    active = Path(os.environ["STATE"], "active")
    scope = arguments.pop(0) if arguments[0] == "--user" else "--system"
    quiet = [argument for argument in arguments if argument != "--quiet"]
    command, *units = quiet
    require(all(unit.removesuffix(".service") == UNIT for unit in units), f"there is no unit {units}")
    require(scope == os.environ.get("SCOPE", "--user"), f"the unit is not one of {scope}")
    match command, bool(units):
        case "is-active", True:
            sys.exit(0 if active.exists() else 3)
        case (("start" | "restart"), True):
            active.touch()
        case "stop", True:
            active.unlink()
        case ("enable", True) | ("daemon-reload", False):
            pass
        case _:
            require(False, f"systemctl does not know {arguments}")


def loginctl(arguments: list[str]) -> None:
    """``enable-linger``, for the user who calls it or another one."""
    require(arguments[0] == "enable-linger" and len(arguments) < 3, f"loginctl does not know {arguments}")


# The first hour


def pipx(arguments: list[str]) -> None:
    """``install`` from the clone, which brings our command."""
    require(arguments in (["install", "."], ["install", "--force", "."]), f"pipx does not know {arguments}")
    scripts = tomllib.loads(Path("pyproject.toml").read_text())["project"]["scripts"]
    require(UNIT in scripts, "the package has no such command")


def make(arguments: list[str]) -> None:
    """Print what the real make would do."""
    program = shutil.which("make", path=os.defpath)
    assert program
    os.execv(program, [program, "--dry-run", *arguments])


def claude(arguments: list[str]) -> None:
    """``mcp add`` of a server that is configured."""
    require(arguments[:4] == ["mcp", "add", "--transport", "http"], f"claude does not know {arguments}")
    name, url = arguments[4:]
    require(urlsplit(url).netloc == "127.0.0.1:8787", f"nothing listens at {url}")
    require(urlsplit(url).path == f"/{name}/mcp", f"{url} does not lead to {name}")
    require(name in document("mcp-auth-proxy.yaml")["servers"], f"{name} is not configured")


def mcp_auth_proxy(arguments: list[str]) -> None:
    """Run our command if it ends by itself and needs no server; else check how it is called."""
    if arguments[0] in ("check", "service", "status"):
        os.execv(sys.executable, [sys.executable, "-m", "mcp_auth_proxy", *arguments])
    context = click.Context(cli)
    name, command, rest = cli.resolve_command(context, arguments)
    assert command is not None
    try:
        values = command.make_context(name, rest, context).params
    except click.ClickException as error:
        require(False, error.format_message())
    server = values.get("server")
    if server is not None and "://" not in server:
        name = server.partition("@")[0]
        require(name in document("mcp-auth-proxy.yaml")["servers"], f"{server} is not configured")


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "claude": claude,
    "docker": docker,
    "helm": helm,
    "kubectl": kubectl,
    "loginctl": loginctl,
    "make": make,
    "mcp-auth-proxy": mcp_auth_proxy,
    "pipx": pipx,
    "systemctl": systemctl,
}


if __name__ == "__main__":
    COMMANDS[sys.argv[1]](sys.argv[2:])
