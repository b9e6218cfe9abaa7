"""Every command of docs/deployment.md and README.md, run in a clone.

What needs a daemon, a cluster or a registry is checked against the real files by tests/fakes/deploy_commands.py.
"""

import os
import re
import shutil
import sqlite3
import stat
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from conftest import SEARCH
from fakes import deploy_commands
from mcp_auth_proxy.config.settings import KeySource, StoreSettings
from mcp_auth_proxy.store.cipher import Cipher, load_key
from mcp_auth_proxy.store.sqlite import bootstrap, schema

ROOT = Path(__file__).resolve().parents[2]
STORES = ROOT / "tests/store/stores"
IS_ROOT = os.geteuid() == 0
OLD = 5
"""The schema that the documentation goes back to."""

UPGRADE = "stop mcp-auth-proxy\npipx install"

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the commands are those of Linux")


@dataclass(frozen=True)
class Block:
    """Commands of a document, and the heading that they are under."""

    document: str
    heading: str
    text: str

    def __str__(self) -> str:
        return f"{Path(self.document).stem}: {self.heading}: {self.text.splitlines()[0]}"


def blocks_of(document: str, language: str = "sh") -> list[Block]:
    """Return the blocks of a document in one language."""
    found, heading = [], ""
    for title, marked, text in re.findall(
        r"^#+ ([^\n]+)$|^```(\w*)\n(.*?)^```$", (ROOT / document).read_text(), re.MULTILINE | re.DOTALL
    ):
        heading = title or heading
        if text and marked == language:
            found.append(Block(document, heading, text))
    return found


BLOCKS = [*blocks_of("docs/deployment.md"), *blocks_of("README.md")]
NOT_USERS = ("System service", "Backup", "Upgrades", "Kubernetes", "Replicas")
USERS = [block for block in BLOCKS if block.heading not in NOT_USERS]


def under(heading: str, word: str) -> Block:
    """Return the block under a heading that has this word."""
    (found,) = (block for block in BLOCKS if block.heading == heading and word in block.text)
    return found


@dataclass
class Clone:
    """A clone of the project, a home, and the commands that are not run for real."""

    folder: Path
    env: dict[str, str] = field(default_factory=dict)
    prefix: tuple[str, ...] = ()

    @property
    def settings(self) -> StoreSettings:
        """Those of a store in this folder, as a configuration without ``store`` has them."""
        key = KeySource(kind="file", name=str(self.folder / "mcp-auth-proxy.key"))
        return StoreSettings(path=self.folder / "mcp-auth-proxy.db", keys=(key,), default_key=True)

    def run(self, script: str) -> subprocess.CompletedProcess[str]:
        """Run commands as a terminal would, but end with the first one that fails."""
        home = self.folder.with_name("home")
        environ = {
            "PATH": f"{self.folder.with_name('bin')}:{os.environ['PATH']}",
            "HOME": str(home),
            "LOGNAME": "ada",
            "STATE": str(home),
            "HELM": shutil.which("helm", path=SEARCH) or "",
            "PYTHONPATH": os.pathsep.join(sys.path),
            "GIT_CONFIG_GLOBAL": os.devnull,
            **self.env,
        }
        command = [*self.prefix, "sh", "-euc", script]
        return subprocess.run(
            command, cwd=self.folder, env=environ, capture_output=True, text=True, timeout=50, check=False
        )

    def succeed(self, block: Block) -> str:
        done = self.run(block.text)
        assert done.returncode == 0, f"{block}:\n{done.stderr}"
        return done.stdout


@pytest.fixture
def clone(tmp_path: Path) -> Clone:
    folder, bin_folder = tmp_path / "clone", tmp_path / "bin"
    for made in (folder, bin_folder, tmp_path / "home"):
        made.mkdir()
    for name in ("Dockerfile", "Makefile", "README.md", "compose.yaml", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    for name in ("deploy", "requirements"):
        shutil.copytree(ROOT / name, folder / name)
    for name in deploy_commands.COMMANDS:
        script = bin_folder / name
        script.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{deploy_commands.__file__}" {name} "$@"\n')
        script.chmod(0o755)
    (yaml_block,) = (block for block in blocks_of("README.md", "yaml") if "warehouse" in block.text)
    (folder / "mcp-auth-proxy.yaml").write_text(yaml_block.text)
    made_clone = Clone(
        folder, {"WAREHOUSE_SECRET": "s", "WAREHOUSE_CLIENT_SECRET": "s", "DATABASE_URL": "postgresql://db"}
    )
    committed = "git init --quiet; git -c user.name=a -c user.email=a@b.example commit --quiet --allow-empty -m a"
    assert made_clone.run(committed).returncode == 0
    # As root, `service` would install the service of the system.
    made_clone.prefix = ("unshare", "--user", "--map-user=1000", "--map-group=1000") if IS_ROOT else ()
    return made_clone


def run_before(block: Block) -> list[Block]:
    """Return the blocks under the same heading that come before."""
    same = [other for other in BLOCKS if (other.document, other.heading) == (block.document, block.heading)]
    return same[: same.index(block)]


@pytest.mark.parametrize("block", USERS, ids=str)
def test_the_commands_of_a_user_work(clone: Clone, block: Block) -> None:
    for earlier in run_before(block):
        clone.succeed(earlier)
    clone.succeed(block)


def test_the_secret_has_what_manifest_and_chart_mount(clone: Clone) -> None:
    clone.succeed(under("Kubernetes", "kubectl"))


@pytest.mark.helm
def test_the_chart_is_installed_with_its_examples(clone: Clone) -> None:
    rendered = clone.succeed(under("Kubernetes", "helm"))
    assert rendered.count("kind: Deployment") == 2


@pytest.mark.helm
def test_replicas_are_installed_with_their_example(clone: Clone) -> None:
    rendered = clone.succeed(under("Replicas", "kubectl"))
    assert "replicas: 3" in rendered


def test_the_backup_is_complete_and_private(clone: Clone) -> None:
    block = under("Backup", "backup(")
    settings = clone.settings
    keys, _ = bootstrap.obtain_keys(settings)
    bootstrap.prepare(settings.path, Cipher(keys))
    with closing(sqlite3.connect(settings.path)) as running:
        # What was committed last is only in the log while a proxy runs.
        running.execute("INSERT INTO meta (name, value) VALUES ('probe', x'01')")
        running.commit()
        clone.succeed(block)
    copy = clone.folder / "backup/mcp-auth-proxy.db"
    key = load_key(KeySource(kind="file", name=str(copy.with_suffix(".key"))))
    assert bootstrap.inspect(copy, Cipher([key])) == len(schema.MIGRATIONS)
    with closing(sqlite3.connect(copy)) as backup:
        assert backup.execute("SELECT value FROM meta WHERE name = 'probe'").fetchone() == (b"\x01",)
    for file in (copy, copy.with_suffix(".key")):
        assert stat.S_IMODE(file.stat().st_mode) == 0o600


def content(store: Path) -> list[str]:
    """Return the schema of a store, and the statements that would make it again."""
    with closing(sqlite3.connect(store)) as connection:
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        return [str(version), *connection.iterdump()]


def test_upgrade_and_rollback_end_with_the_old_store_in_its_place(clone: Clone) -> None:
    upgrade, rollback = under("Upgrades", UPGRADE), under("Upgrades", "find")
    settings = clone.settings
    shutil.copy(STORES / f"schema-{OLD}.db", settings.path)
    shutil.copy(STORES / "store.key", settings.path.with_suffix(".key"))
    settings.path.with_suffix(".key").chmod(0o600)
    (clone.folder.with_name("home") / "active").touch()
    before = content(settings.path)
    clone.succeed(upgrade)
    # The service's first start with the new version.
    keys, _ = bootstrap.obtain_keys(settings)
    bootstrap.prepare(settings.path, Cipher(keys))
    assert bootstrap.inspect(settings.path, Cipher(keys)) > OLD
    clone.succeed(rollback)
    assert content(settings.path) == before
    assert stat.S_IMODE(settings.path.stat().st_mode) == 0o600
    assert (clone.folder / "newer/mcp-auth-proxy.db").exists()
    assert settings.path.with_name(f"mcp-auth-proxy.db.schema-{OLD}.bak").exists()


@pytest.mark.skipif(not IS_ROOT, reason="the system's service is installed by root")
def test_the_service_of_the_system_is_installed_as_documented(clone: Clone) -> None:
    """In a mount namespace, with an empty /etc."""
    (section,) = (block for block in blocks_of("docs/deployment.md", "yaml") if block.heading == "System service")
    config = clone.folder / "system.yaml"
    config.write_text(section.text + "servers: {notes: {url: https://mcp.example.com/mcp}}\n")
    etc = f"mount -t tmpfs none /etc; mkdir /etc/mcp-auth-proxy; cp {config} /etc/mcp-auth-proxy/config.yaml; "
    clone.prefix, clone.env["SCOPE"] = ("unshare", "--mount"), "--system"
    shown = "\nstat -c %a /etc/mcp-auth-proxy/store.key; cat /etc/systemd/system/mcp-auth-proxy.service"
    done = clone.run(etc + under("System service", "openssl").text + shown)
    assert done.returncode == 0, done.stderr
    assert "\n600\n" in done.stdout
    assert "--config /etc/mcp-auth-proxy/config.yaml" in done.stdout


def test_every_block_is_run_by_a_test() -> None:
    claimed = Counter(
        [
            *USERS,
            under("Kubernetes", "kubectl"),
            under("Kubernetes", "helm"),
            under("Replicas", "kubectl"),
            under("Backup", "backup("),
            under("Upgrades", "find"),
            under("Upgrades", UPGRADE),
            under("System service", "openssl"),
        ]
    )
    assert claimed == Counter(BLOCKS)


def test_the_first_lines_of_the_compose_file_are_those_of_the_documentation() -> None:
    comment = re.search(r"^#   mkdir(?:.*\n#   )*.*$", (ROOT / "compose.yaml").read_text(), re.MULTILINE)
    assert comment
    lines = [line.removeprefix("#   ") for line in comment[0].splitlines()]
    documented = "".join(block.text for block in BLOCKS if block.heading == "Container").splitlines()
    assert [line for line in documented if line in lines] == lines


BREAKS: dict[str, Callable[[str], str]] = {
    "published to everybody": lambda text: text.replace("-p 127.0.0.1:", "-p 0.0.0.0:"),
    "can't read": lambda text: text.replace("chmod 444", "chmod 400"),
    "is not mounted": lambda text: text.replace("-v ./secrets/store-key:/run/secrets/store-key:ro", ""),
    "not a file": lambda text: text.replace("./deploy/compose/config.yaml:", "./deploy/config.yaml:"),
    "is not this version": lambda text: text.replace("--tag mcp-auth-proxy:", "--tag mcp-auth-proxy:9"),
    "takes no": lambda text: text.replace("--build-arg REVISION", "--build-arg VERSION"),
    "cut off": lambda text: text.replace("--stop-timeout 45", "--stop-timeout 10"),
    "unrecognized arguments": lambda text: text.replace("--detach", "--detached"),
}


@pytest.mark.parametrize("words", BREAKS)
def test_a_mistake_in_the_commands_is_noticed(clone: Clone, words: str) -> None:
    text = under("Container", "docker run").text
    broken = BREAKS[words](text)
    assert broken != text
    done = clone.run(broken)
    assert done.returncode == 2
    assert words in done.stderr
