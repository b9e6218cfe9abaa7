"""What stands behind the contenders: the origin, and nginx as the constant upstream, plain and behind TLS."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench import certificates, nginx
from bench.processes import Child, free_port

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, slots=True)
class Backend:
    """The ports of the constant upstream, of the origin, and of the upstream behind TLS if there is one."""

    upstream: int
    origin: int
    tls: int | None = None
    authority: Path | None = None
    """The certificate of the authority that signed the one of the upstream behind TLS."""

    def urls(self) -> dict[str, str]:
        """Return the upstream URL of each workload, of the large body and of held streams."""
        constant, origin = f"http://127.0.0.1:{self.upstream}", f"http://127.0.0.1:{self.origin}"
        found = {"json": f"{constant}/mcp", "blob": f"{constant}/blob"}
        found |= {name: f"{origin}/{name}" for name in ("events", "apart", "parts", "stream")}
        if self.tls is not None:
            found["tls"] = f"https://127.0.0.1:{self.tls}/mcp"
        return found


@contextmanager
def running(folder: Path, blob_bytes: int) -> Iterator[Backend]:
    """Start the origin and, if nginx is installed, the constant upstreams; stop them at the end."""
    children: list[Child] = []
    try:
        children.append(start_origin(folder, port := free_port(), blob_bytes))
        if not nginx.BINARY:
            yield Backend(upstream=port, origin=port)
            return
        blob = folder / "blob"
        with blob.open("wb") as file:
            file.truncate(blob_bytes)
        issuer = f"http://127.0.0.1:{port}"
        files = certificates.create(folder)
        children.append(nginx.start_upstream(folder, plain := free_port(), issuer=issuer, blob=blob))
        children.append(nginx.start_upstream(folder, tls := free_port(), issuer=issuer, blob=blob, files=files))
        yield Backend(upstream=plain, origin=port, tls=tls, authority=files.authority)
    finally:
        for child in reversed(children):
            child.stop()


def start_origin(folder: Path, port: int, blob_bytes: int) -> Child:
    """Start ``bench.origin``; raise RuntimeError if it is not ready in time."""
    command = [sys.executable, "-m", "bench.origin", str(port), str(blob_bytes)]
    child = Child(command, log=folder / "origin.log", environment={"PYTHONPATH": str(ROOT)})
    child.wait_for(port)
    return child
