"""The image as it is built and run: read-only, without /tmp and capabilities, as its own user and as any other."""

import asyncio
import os
from pathlib import Path

import pytest

from bench.processes import free_port
from fakes.container import CREATED, REVISION, Image, Mount, image
from fakes.fixtures import Servers
from fakes.headless import consent
from fakes.proxy import link_in, serving, write_config
from mcp_auth_proxy import __version__

pytestmark = [
    pytest.mark.buildah,
    pytest.mark.debootstrap,
    pytest.mark.timeout(900),
    pytest.mark.skipif(os.geteuid() != 0, reason="an image is built and run in namespaces by root"),
]
ANY_UID = "1000650000:0"
"""As OpenShift chooses them."""


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Image:
    base = tmp_path_factory.getbasetemp()
    return image((base if worker_id == "master" else base.parent) / "image")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A volume as Docker makes it from the image's /data."""
    folder = tmp_path / "data"
    folder.mkdir()
    os.chown(folder, 10001, 0)
    folder.chmod(0o770)
    return folder


def health_command(built: Image) -> list[str]:
    """Return the arguments that HEALTHCHECK gives to the program."""
    kind, program, *arguments = built.config["Healthcheck"]["Test"]
    assert (kind, [program]) == ("CMD", built.config["Entrypoint"])
    return [str(argument) for argument in arguments]


@pytest.mark.parametrize("user", [None, ANY_UID], ids=["its own user", "any user"])
async def test_a_consent_and_a_call(
    built: Image, servers: Servers, tmp_path: Path, data: Path, user: str | None
) -> None:
    issuer = await servers.authorization_server(auto_consent=True)
    upstream = await servers.mcp_server(issuer)
    config = write_config(
        tmp_path,
        {"notes": upstream.url},
        authorization={"wait": "0s"},
        health_listen=f"127.0.0.1:{free_port()}",
        store={"url": "sqlite:////data/mcp-auth-proxy.db"},
    )
    config.chmod(0o644)
    mounts = [Mount(data, "/data", writable=True), Mount(config, "/etc/mcp-auth-proxy/config.yaml")]
    program = built.command(user=user, mounts=mounts)
    arguments = [*built.config["Cmd"][1:], "--listen", "127.0.0.1:0"]
    async with serving(*arguments, program=program) as proxy, proxy.client("notes") as client:
        page = await consent(link_in((await client.call("echo")).message))
        assert page.status_code == 200, page.text
        assert (await client.call("echo", text="in the image")).text == "in the image"
        checked = await asyncio.to_thread(built.run, *health_command(built), user=user, mounts=mounts)
        assert (checked.returncode, checked.stdout) == (0, "ready\n"), checked.stderr
    checked = await asyncio.to_thread(built.run, *health_command(built), user=user, mounts=mounts)
    assert (checked.returncode, checked.stderr.count("\n")) == (1, 1), checked.stderr
    uid = int((user or built.config["User"]).partition(":")[0])
    assert {file.stat().st_uid for file in data.iterdir()} == {uid}


@pytest.mark.parametrize("user", [None, ANY_UID], ids=["its own user", "any user"])
def test_the_demo(built: Image, data: Path, user: str | None) -> None:
    done = built.run("demo", user=user, mounts=[Mount(data, "/data", writable=True)])
    assert done.returncode == 0, done.stdout + done.stderr


def test_nothing_but_the_volume_can_be_written(built: Image, data: Path) -> None:
    script = 'for folder in / /app /etc /var /tmp /data; do touch "$folder/x" 2>/dev/null && echo "$folder"; done; true'
    done = built.run("/bin/sh", "-c", script, mounts=[Mount(data, "/data", writable=True)])
    assert done.stdout.split() == ["/data"]


def test_the_program_belongs_to_root_and_there_is_no_pip(built: Image) -> None:
    program = [path for path in (built.root / "app").rglob("*") if not path.is_symlink()]
    assert {(path.stat().st_uid, path.stat().st_mode & 0o022) for path in program} == {(0, 0)}
    found = built.run("/usr/local/bin/python", "-c", "import pip")
    assert "No module named 'pip'" in found.stderr
    unwanted = {"pip", "pip3", "ensurepip", "gcc", "cc", "make"}
    roots = [built.root / "usr", built.root / "app"]
    assert [
        path for root in roots for path in root.rglob("*") if path.name in unwanted and "share" not in path.parts
    ] == []


def test_each_module_is_compiled_once(built: Image) -> None:
    library = next((built.root / "app/lib").glob("python3*"))
    for source in library.rglob("*.py"):
        compiled = list((source.parent / "__pycache__").glob(f"{source.stem}.*.pyc"))
        assert len(compiled) == 1, source


def test_the_configuration_of_the_image(built: Image) -> None:
    config = built.config
    assert config["User"].partition(":")[0].isdigit()
    assert (config["WorkingDir"], list(config["Volumes"]), config["StopSignal"]) == ("/data", ["/data"], "SIGTERM")
    labels = {name.removeprefix("org.opencontainers.image."): value for name, value in config["Labels"].items()}
    assert (labels["version"], labels["revision"], labels["created"]) == (__version__, REVISION, CREATED)
    assert "source" in labels
    assert config["Healthcheck"]["Test"] == ["CMD", "mcp-auth-proxy", "healthcheck"]
    folder = (built.root / "data").stat()
    assert (folder.st_uid, folder.st_gid, folder.st_mode & 0o7777) == (10001, 0, 0o770)
