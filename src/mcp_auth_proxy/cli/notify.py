"""Tell systemd when the proxy is ready and when it stops (sd_notify(3))."""

import contextlib
import os
import socket

READY = "READY=1"
STOPPING = "STOPPING=1"


def notify(state: str) -> None:
    """Send a state to the service manager, if there is one that waits for it. Never raises."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        # "@" stands for the null byte that begins an abstract address.
        sock.connect("\0" + address[1:] if address[0] == "@" else address)
        sock.sendall(state.encode())
