"""Two network namespaces with a cable between them: a pod, and the node whose kubelet probes it."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

ADDRESS = "10.99.0.2"
"""Of the pod. It exists in these namespaces only."""

_NODE_ADDRESS = "10.99.0.1"

_GET = """
import http.client, sys
connection = http.client.HTTPConnection(sys.argv[1], int(sys.argv[2]), timeout=5)
try:
    connection.request("GET", sys.argv[3])
    print(connection.getresponse().status)
except OSError as error:
    print(type(error).__name__)
"""


@dataclass(frozen=True, slots=True)
class PodNetwork:
    pod: str
    node: str

    def inside(self, *command: str) -> tuple[str, ...]:
        """Return a command as a container of the pod runs it."""
        return ("ip", "netns", "exec", self.pod, *command)

    def get_from_node(self, port: int, path: str) -> str:
        """Return the status that the node sees at the pod's address, or the name of the error."""
        return self._get(self.node, ADDRESS, port, path)

    def get_from_pod(self, port: int, path: str) -> str:
        """Return the status that another container of the pod sees on loopback, or the name of the error."""
        return self._get(self.pod, "127.0.0.1", port, path)

    def _get(self, namespace: str, host: str, port: int, path: str) -> str:
        command = ["ip", "netns", "exec", namespace, sys.executable, "-c", _GET, host, str(port), path]
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()


@contextmanager
def pod_network() -> Iterator[PodNetwork]:
    """Make the namespaces; delete them at the end of the block."""
    mine = os.getpid()
    network = PodNetwork(f"mcp-pod-{mine}", f"mcp-node-{mine}")
    try:
        for name in (network.pod, network.node):
            _ip("netns", "add", name)
        ends = [(network.pod, f"pod{mine}", ADDRESS), (network.node, f"node{mine}", _NODE_ADDRESS)]
        (pod, pod_end, _), (node, node_end, _) = ends
        _ip("link", "add", pod_end, "netns", pod, "type", "veth", "peer", "name", node_end, "netns", node)
        for name, end, address in ends:
            _ip("-n", name, "address", "add", f"{address}/24", "dev", end)
            _ip("-n", name, "link", "set", end, "up")
            _ip("-n", name, "link", "set", "lo", "up")
        yield network
    finally:
        for name in (network.pod, network.node):
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, timeout=20, check=False)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], capture_output=True, timeout=20, check=True)
