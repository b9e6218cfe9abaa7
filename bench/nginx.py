"""nginx: the constant upstream that stands behind everyone, and the reverse proxy to compare with."""

import json
import os
import shutil
from pathlib import Path

from bench.origin import CHALLENGE, TOKEN, mcp_answer, resource_metadata
from bench.processes import Child

BINARY = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")

FRAME = """
{user}
daemon off;
master_process on;
worker_processes 1;
worker_rlimit_nofile 16384;
pid {folder}/{name}.pid;
error_log {folder}/{name}.error.log crit;
events {{ worker_connections 8192; }}
http {{
    access_log off;
    default_type application/json;
    keepalive_requests 100000000;
    sendfile on;
    tcp_nodelay on;
    client_body_temp_path {folder}/{name}.body;
    proxy_temp_path {folder}/{name}.proxy;
    fastcgi_temp_path {folder}/{name}.fastcgi;
    uwsgi_temp_path {folder}/{name}.uwsgi;
    scgi_temp_path {folder}/{name}.scgi;
{servers}
}}
"""

UPSTREAM = """
    server {{
        listen 127.0.0.1:{port} backlog=4096;
        location = /.well-known/oauth-protected-resource/mcp {{ return 200 '{mcp_metadata}'; }}
        location = /.well-known/oauth-protected-resource/blob {{ return 200 '{blob_metadata}'; }}
        location = /mcp {{
            add_header WWW-Authenticate '{mcp_challenge}' always;
            if ($http_authorization != "Bearer {token}") {{ return 401; }}
            return 200 '{answer}';
        }}
        location = /blob {{
            add_header WWW-Authenticate '{blob_challenge}' always;
            if ($http_authorization != "Bearer {token}") {{ return 401; }}
            default_type application/octet-stream;
            alias {blob};
        }}
    }}
"""

PROXY = """
    upstream constant {{ server 127.0.0.1:{upstream}; keepalive 256; keepalive_requests 100000000; }}
    upstream streams {{ server 127.0.0.1:{origin}; keepalive 256; }}
    server {{
        listen 127.0.0.1:{port} backlog=4096;
        proxy_http_version 1.1;
        proxy_set_header Connection "";
        proxy_set_header Authorization "Bearer {token}";
        proxy_max_temp_file_size 0;
        location /bench/mcp {{ proxy_pass http://constant/mcp; }}
        location /blob/mcp {{ proxy_pass http://constant/blob; }}
        location /stream/mcp {{ proxy_pass http://streams/stream; proxy_buffering off; proxy_read_timeout 600s; }}
    }}
"""


def start_upstream(folder: Path, port: int, *, issuer: str, blob: Path) -> Child:
    """An upstream that answers every tool call with the same bytes, to those who bring the token."""
    base = f"http://127.0.0.1:{port}"
    server = UPSTREAM.format(
        port=port,
        token=TOKEN,
        answer=json.dumps(mcp_answer({"id": 1}), separators=(",", ":")),
        mcp_metadata=json.dumps(resource_metadata(base, "/mcp", issuer)),
        mcp_challenge=CHALLENGE.format(base=base, path="/mcp"),
        blob_metadata=json.dumps(resource_metadata(base, "/blob", issuer)),
        blob_challenge=CHALLENGE.format(base=base, path="/blob"),
        blob=blob,
    )
    return start(folder, "upstream", port, server)


def start_proxy(folder: Path, port: int, *, upstream: int, origin: int) -> Child:
    """A reverse proxy that adds a static header: what forwarding costs at the least."""
    return start(folder, "proxy", port, PROXY.format(port=port, upstream=upstream, origin=origin, token=TOKEN))


def start(folder: Path, name: str, port: int, servers: str) -> Child:
    if BINARY is None:
        raise RuntimeError("nginx is not installed")
    user = "user root;" if os.geteuid() == 0 else ""  # else the worker of root's nginx could not read the folder
    file = folder / f"{name}.conf"
    file.write_text(FRAME.format(folder=folder, name=name, servers=servers, user=user))
    command = [BINARY, "-c", str(file), "-p", str(folder), "-e", f"{folder}/{name}.error.log"]
    child = Child(command, log=folder / f"{name}.log")
    child.wait_for(port)
    return child
