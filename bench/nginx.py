"""nginx: the constant upstream behind all contenders, and the reverse proxy to compare with."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from bench.certificates import Certificates
from bench.origin import CHALLENGE, TOKEN, resource_metadata
from bench.processes import Child
from bench.workloads import ANSWER

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
        listen 127.0.0.1:{port}{ssl} backlog=4096;
        {certificate}
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

CERTIFICATE = """
        ssl_certificate {files.certificate};
        ssl_certificate_key {files.key};
        ssl_protocols TLSv1.2 TLSv1.3;
"""

PROXY = """
{upstreams}
    server {{
        listen 127.0.0.1:{port} backlog=4096;
        proxy_http_version 1.1;
        proxy_set_header Connection "";
        proxy_set_header Authorization "Bearer {token}";
        proxy_max_temp_file_size 0;
{locations}
    }}
"""

POOL = "    upstream {name} {{ server {address}; keepalive 256; keepalive_requests 100000000; }}"
LOCATION = "        location /{name}/mcp {{ proxy_pass {scheme}://{name}/{path}; {options} }}"

HELD = "proxy_buffering off; proxy_read_timeout 600s;"
"""For held streams alone: other answers are buffered, as is nginx's default, which makes it faster."""

VERIFY = """
            proxy_ssl_verify on;
            proxy_ssl_name localhost;
            proxy_ssl_protocols TLSv1.2 TLSv1.3;
            proxy_ssl_trusted_certificate {authority};
        """


def start_upstream(folder: Path, port: int, *, issuer: str, blob: Path, files: Certificates | None = None) -> Child:
    """Start an upstream that answers each tool call with the token by the same bytes; over TLS with ``files``."""
    base = f"http{'s' if files else ''}://127.0.0.1:{port}"
    server = UPSTREAM.format(
        port=port,
        ssl=" ssl" if files else "",
        certificate=CERTIFICATE.format(files=files) if files else "",
        token=TOKEN,
        answer=ANSWER.decode(),
        mcp_metadata=json.dumps(resource_metadata(base, "/mcp", issuer)),
        mcp_challenge=CHALLENGE.format(base=base, path="/mcp"),
        blob_metadata=json.dumps(resource_metadata(base, "/blob", issuer)),
        blob_challenge=CHALLENGE.format(base=base, path="/blob"),
        blob=blob,
    )
    return start(folder, f"upstream-{port}", port, server)


def start_proxy(folder: Path, port: int, *, urls: Mapping[str, str], authority: Path | None) -> Child:
    """Start a reverse proxy that serves each URL under its name and adds a static header."""
    upstreams, locations = [], []
    for name, url in urls.items():
        scheme, _, rest = url.partition("://")
        address, _, path = rest.partition("/")
        options = VERIFY.format(authority=authority) if scheme == "https" else HELD if name == "stream" else ""
        upstreams.append(POOL.format(name=name, address=address))
        locations.append(LOCATION.format(name=name, scheme=scheme, path=path, options=options))
    server = PROXY.format(port=port, token=TOKEN, upstreams="\n".join(upstreams), locations="\n".join(locations))
    return start(folder, f"proxy-{port}", port, server)


def start(folder: Path, name: str, port: int, servers: str) -> Child:
    """Start nginx with one worker; raise RuntimeError if it is not installed or not ready in time."""
    if BINARY is None:
        raise RuntimeError("nginx is not installed")
    user = "user root;" if os.geteuid() == 0 else ""  # otherwise the worker of root's nginx could not read the folder
    file = folder / f"{name}.conf"
    file.write_text(FRAME.format(folder=folder, name=name, servers=servers, user=user))
    command = [BINARY, "-c", str(file), "-p", str(folder), "-e", f"{folder}/{name}.error.log"]
    child = Child(command, log=folder / f"{name}.log")
    child.wait_for(port)
    return child
