"""The image, built by buildah on a base that debootstrap makes, and run in namespaces like a container.

Nothing can be pulled where the tests run, so the base is Debian's trixie with the tag that FROM names. It differs from
the real one in where Python is (/usr instead of /usr/local).
"""

import ensurepip
import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
MIRROR = "http://deb.debian.org/debian"
TAG = "mcp-auth-proxy:test"
REVISION = "0123456789abcdef0123456789abcdef01234567"
CREATED = "2026-01-02T03:04:05Z"

_ENTER = """
set -e
root=$1; shift
mount --bind "$root" "$root"
while test "$1" != --; do
    if test -d "$1"; then mkdir -p "$root$2"; else mkdir -p "$(dirname "$root$2")"; touch "$root$2"; fi
    mount --bind "$1" "$root$2"; test "$3" = rw || mount -o "remount,bind,$3" "$root$2"
    shift 3
done
shift
rm -rf "$root/tmp"
mkdir -p "$root/proc" "$root/dev"
mount -t proc proc "$root/proc"
for device in null urandom; do touch "$root/dev/$device"; mount --bind "/dev/$device" "$root/dev/$device"; done
mount -o remount,bind,ro "$root"
exec "$@"
"""


@dataclass(frozen=True, slots=True)
class Mount:
    source: Path
    target: str
    writable: bool = False

    @property
    def flags(self) -> tuple[str, str, str]:
        return str(self.source), self.target, "rw" if self.writable else "ro"


@dataclass(frozen=True, slots=True)
class Image:
    """A built image: its file system, which every run sees read-only, and its configuration."""

    root: Path
    config: Mapping[str, Any]

    def command(
        self, *arguments: str, user: str | None = None, mounts: Sequence[Mount] = (), groups: Sequence[int] = ()
    ) -> list[str]:
        """Return how to run the image: read-only, without /tmp and capabilities, in the network of the machine.

        ``user`` is ``uid:gid``, by default the image's own. ``arguments`` are given to its entry point, or replace it
        if the first one is a path.
        """
        uid, _, gid = (user or self.config["User"]).partition(":")
        entry = [] if arguments and arguments[0].startswith("/") else self.config["Entrypoint"]
        flags = [
            text for mount in mounts for text in (str(mount.source), mount.target, "rw" if mount.writable else "ro")
        ]
        drop = ["--bounding-set=-all", "--inh-caps=-all", "--no-new-privs", f"--reuid={uid}", f"--regid={gid or 0}"]
        drop.append(f"--groups={','.join(map(str, groups))}" if groups else "--clear-groups")
        inner = ["/usr/bin/setpriv", *drop, "/usr/bin/env", "-i", *self.config["Env"]]
        change = ["chroot", str(self.root), *inner, "sh", "-c", f'cd {self.config["WorkingDir"]} && exec "$@"', "sh"]
        return [
            "unshare",
            "--mount",
            "sh",
            "-c",
            _ENTER,
            "sh",
            str(self.root),
            *flags,
            "--",
            *change,
            *entry,
            *arguments,
        ]

    def run(self, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run the image to its end."""
        command = self.command(*arguments, **options)
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@dataclass(slots=True)
class Buildah:
    """Buildah with a storage of its own, which goes with its folder."""

    folder: Path
    containers: list[str] = field(default_factory=list)

    def __call__(self, *arguments: str) -> str:
        storage = [
            "--root",
            str(self.folder / "root"),
            "--runroot",
            str(self.folder / "run"),
            "--storage-driver",
            "vfs",
        ]
        env = {**os.environ, "BUILDAH_ISOLATION": "chroot", "TMPDIR": str(self.folder)}
        done = subprocess.run(
            ["buildah", *storage, *arguments],
            capture_output=True,
            text=True,
            timeout=600,
            env=env,
            cwd=ROOT,
            check=False,
        )
        assert done.returncode == 0, f"buildah {arguments[0]}: {done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        return done.stdout.strip()

    def container(self, image: str) -> str:
        self.containers.append(self("from", "--pull-never", image))
        return self.containers[-1]

    def close(self) -> None:
        for container in self.containers:
            self("rm", container)


def image(folder: Path) -> Image:
    """Return the image, which is built once for all processes that share ``folder``."""
    folder.mkdir(exist_ok=True)
    done = folder / "image.json"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            done.write_text(json.dumps(_build(folder)))
    found = json.loads(done.read_text())
    return Image(Path(found["root"]), found["config"])


def _build(folder: Path) -> dict[str, Any]:
    buildah = Buildah(folder / "buildah")
    buildah.folder.mkdir()
    (base,) = set(re.findall(r"^FROM (\S+)", (ROOT / "Dockerfile").read_text(), re.MULTILINE))
    _make_base(buildah, folder / "trixie", f"docker.io/library/{base}")
    labels = ["--build-arg", f"REVISION={REVISION}", "--build-arg", f"CREATED={CREATED}"]
    buildah("build", "--format", "docker", "--pull-never", *labels, "--tag", TAG, str(ROOT))
    config = json.loads(buildah("inspect", "--type", "image", TAG))["Docker"]["config"]
    root = buildah("mount", buildah.container(TAG))
    return {"root": root, "config": config}


def _make_base(buildah: Buildah, tree: Path, tag: str) -> None:
    packages = "python3,ca-certificates"
    command = ["debootstrap", "--variant=minbase", f"--include={packages}", "trixie", str(tree), MIRROR]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, f"debootstrap: {done.stdout[-3000:]}"
    (tree / "usr/local/bin/python").symlink_to("/usr/bin/python3")
    # What this machine trusts: its package index may be a mirror.
    trusted = Path("/etc/ssl/certs/ca-certificates.crt")
    if trusted.exists():
        shutil.copy(trusted, tree / "etc/ssl/certs/ca-certificates.crt")
    (tree / "etc/pip.conf").write_text(_pip_configuration())
    # Like the real base, with a pip under /usr/local.
    (wheel,) = (Path(ensurepip.__file__).parent / "_bundled").glob("pip-*.whl")
    shutil.copy(wheel, tree)
    install = ["python3", f"/{wheel.name}/pip", "install", "--quiet", "--break-system-packages", "--no-index"]
    subprocess.run(["chroot", str(tree), *install, f"/{wheel.name}"], check=True, timeout=120)
    (tree / wheel.name).unlink()
    container = buildah.container("scratch")
    buildah("add", "--quiet", container, str(tree), "/")
    buildah("commit", "--quiet", container, tag)
    shutil.rmtree(tree)


def _pip_configuration() -> str:
    """Return a pip.conf with the index that pip uses on this machine."""
    lines = ["[global]", "cert = /etc/ssl/certs/ca-certificates.crt", "break-system-packages = true"]
    listing = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, timeout=60, check=False
    ).stdout
    found = re.search(r"index-url='(https?://[^']+)'", listing)
    if found:
        lines.append(f"index-url = {found[1]}")
    return "\n".join([*lines, ""])
