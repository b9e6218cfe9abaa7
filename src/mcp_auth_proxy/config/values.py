"""Parsers for the values of the configuration. Each raises ValueError with a text that continues "<key>: …"."""

import base64
import ipaddress
import math
import re
import shlex

from mcp_auth_proxy.config.settings import Address
from mcp_auth_proxy.net import urls
from mcp_auth_proxy.net.peers import IPNetwork, parse_network

_DURATION = re.compile(r"(\d+(?:\.\d+)?) ?(ms|s|m|h|d)?", re.ASCII)
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, None: 1.0}
_LONGEST = 365 * 24 * 3600.0
_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?(B|kB|KB|MB|GB|KiB|MiB|GiB)?", re.ASCII)
_BYTES = {
    None: 1, "B": 1, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30,
}  # fmt: skip
_LARGEST = 2**40
_PRINTABLE = re.compile(r"[!-\[\]-~]+")
_SCOPE = re.compile(r"[!#-\[\]-~]+")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:.+")
_HIGHEST_PORT = 65535
_SHORTEST_WEBHOOK_SECRET = 16


def duration(text: str) -> float:
    """Return seconds from ``45s``, ``500ms``, ``2m``, ``1h``, ``7d`` or a plain number of seconds."""
    found = _DURATION.fullmatch(text)
    if found is None:
        raise ValueError("must be a duration such as 45s, 500ms, 2m, 1h or 7d")
    seconds = float(found[1]) * _SECONDS[found[2]]
    if not math.isfinite(seconds) or seconds > _LONGEST:
        raise ValueError("must be at most 365 days (8760h)")
    return seconds


def positive_duration(text: str) -> float:
    """Return seconds as ``duration`` does, but not 0."""
    seconds = duration(text)
    if seconds == 0:
        raise ValueError("must be more than 0")
    return seconds


def size(text: str) -> int:
    """Return bytes from ``16MiB``, ``1MB``, ``512KiB`` or a plain number of bytes; 1 byte to 1024 GiB."""
    found = _SIZE.fullmatch(text)
    if found is None:
        raise ValueError("must be a size such as 16MiB, 1MB or a number of bytes")
    number = float(found[1]) * _BYTES[found[2]]
    if not 1 <= number <= _LARGEST:
        raise ValueError("must be between 1 byte and 1024GiB")
    return int(number)


def count(text: str) -> int:
    """Return a whole number from 1 to 1,000,000."""
    if re.fullmatch(r"\d{1,7}", text, re.ASCII) is None or not 1 <= int(text) <= 1_000_000:
        raise ValueError("must be a whole number from 1 to 1000000")
    return int(text)


def rate(text: str) -> float:
    """Return how often something may be done in a second: a whole number from 1 to 1000, or at least 0.01."""
    found = float(text) if re.fullmatch(r"\d{1,4}(\.\d{1,6})?", text, re.ASCII) else 0.0
    if not 0.01 <= found <= 1000 or (found > 1 and found != int(found)):
        raise ValueError("must be a whole number from 1 to 1000, or a fraction from 0.01 on, such as 0.5")
    return found


def host(text: str) -> str:
    """Return a host name or an IP address, in lower case; IPv6 without brackets."""
    bare = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    if not urls.is_host(bare):
        raise ValueError("must be a host name or an IP address")
    return bare.lower()


def port(text: str) -> int:
    """Return a TCP port; 0 lets the system choose."""
    if re.fullmatch(r"\d{1,5}", text, re.ASCII) is None or int(text) > _HIGHEST_PORT:
        raise ValueError(f"the port must be a number from 0 to {_HIGHEST_PORT}")
    return int(text)


def address(text: str) -> Address:
    """Return the address of ``HOST:PORT``; an IPv6 host is written in brackets."""
    name, colon, number = text.rpartition(":")
    if not colon or not number:
        raise ValueError("must be HOST:PORT, for example 127.0.0.1:8787")
    if not name:
        raise ValueError(
            f"has no host: write 127.0.0.1:{number} for this machine or 0.0.0.0:{number} for all interfaces"
        )
    if ":" in name and not (name.startswith("[") and name.endswith("]")):
        raise ValueError("an IPv6 address is written in brackets: [::1]:8787")
    return Address(host=host(name), port=port(number))


def address_or_port(text: str) -> Address:
    """Return an address as ``address`` does, or that of a port on 127.0.0.1."""
    return Address(host="127.0.0.1", port=port(text)) if text.isdecimal() else address(text)


def allowed_host(text: str) -> str:
    """Return an allowed Host header, ``name`` or ``name:port``, in lower case."""
    if "/" in text:
        raise ValueError("must be a host with or without a port: no scheme, no path")
    name, colon, number = text.rpartition(":")
    if colon and not text.endswith("]"):
        port(number)
        bare = host(name)
        return f"[{bare}]:{number}" if ":" in bare else f"{bare}:{number}"
    bare = host(text)
    return f"[{bare}]" if ":" in bare else bare


def allowed_origin(text: str) -> str:
    """Return a web origin, ``scheme://host[:port]``, as browsers write it (RFC 6454 §6.2)."""
    scheme, separator, authority = text.lower().partition("://")
    found = urls.split_authority(authority)
    if not separator or found is None or authority.endswith(":") or not re.fullmatch(r"[a-z][a-z0-9+.-]*", scheme):
        raise ValueError(
            "must be the origin of a web page, scheme://host or scheme://host:port: no path, no *, not null"
        )
    if scheme not in urls.DEFAULT_PORTS:
        # Of an extension or an application: its host is a name that is not looked up.
        return f"{scheme}://{authority}"
    return url(f"{scheme}://{authority}").origin.serialized


def private_target(text: str) -> str:
    """Return a host name, an address or a network (CIDR)."""
    if "/" not in text:
        return host(text)
    try:
        return str(ipaddress.ip_network(text))
    except ValueError as error:
        raise ValueError(f"must be a host name, an address or a network such as 10.0.0.0/8 ({error})") from None


def network(text: str) -> IPNetwork:
    """Return the network of an address or of a network (CIDR); IPv4 even if it is written as IPv6."""
    try:
        return parse_network(text)
    except ValueError as error:
        raise ValueError(f"must be an address or a network such as 10.0.0.0/8 ({error})") from None


def url(text: str) -> urls.Url:
    """Return the parts of an absolute http(s) URL without userinfo and fragment. Errors never contain the URL."""
    return urls.parse(text)


def webhook_url(text: str) -> str:
    """Return the URL that events are posted to, exactly as written: https, or http on loopback."""
    origin = url(text).origin
    if origin.scheme == "http" and not urls.is_loopback(origin.host):
        raise ValueError("must be https unless its host is loopback: it tells who uses what")
    return text


def webhook_secret(text: str) -> str:
    """Return the secret of a webhook. One with ``whsec_`` is base64 behind that, as Standard Webhooks writes it."""
    if text.startswith("whsec_"):
        try:
            secret = base64.b64decode(text.removeprefix("whsec_"), validate=True)
        except ValueError:
            raise ValueError("must be base64 behind whsec_, or not begin with that") from None
        if len(secret) < _SHORTEST_WEBHOOK_SECRET:
            raise ValueError(
                f"must have at least {_SHORTEST_WEBHOOK_SECRET} bytes behind whsec_, or anybody could guess it; make "
                'one with: echo "whsec_$(openssl rand -base64 32)"'
            )
    return text


def public_url(text: str) -> str:
    """Return the origin that browsers use for the proxy, without a trailing slash."""
    parsed = url(text)
    if parsed.path not in ("", "/") or "?" in text:
        raise ValueError("must be scheme://host[:port] without a path or query")
    if parsed.origin.scheme == "http" and not urls.is_loopback(parsed.origin.host):
        raise ValueError("must be https unless its host is loopback: authorization codes come back to it")
    return urls.raw_origin(text).lower()


def issuer(text: str, *, own: str = "") -> str:
    """Return an issuer identifier (RFC 8414 §2), exactly as written.

    ``own``: the URL of a server with allow_http. The issuer may then be http at the same origin.
    """
    if not own or url(text).origin != url(own).origin:
        endpoint(text)
    if "?" in text:
        raise ValueError("must not have a query (RFC 8414 §2)")
    return text


def endpoint(text: str) -> str:
    """Return the URL of an OAuth endpoint (RFC 6749 §3.1, §3.2), exactly as written: https, or http on loopback."""
    origin = url(text).origin
    if origin.scheme == "http" and not urls.is_loopback(origin.host):
        raise ValueError("must be https unless its host is loopback: secrets, codes and tokens go there")
    return text


def any_url(text: str) -> str:
    """Return a URL that the proxy does not use itself, exactly as written."""
    url(text)
    return text


def client_metadata_url(text: str) -> str:
    """Return a URL that can be a client_id: https, with a path."""
    parsed = url(text)
    if parsed.origin.scheme != "https" or parsed.path in ("", "/"):
        raise ValueError("must be an https URL with a path: it is used as client_id")
    return text


def resource(text: str) -> str:
    """Return ``auto``, ``omit`` or an absolute URI without fragment (RFC 8707 §2)."""
    if text in ("auto", "omit"):
        return text
    if _SCHEME.fullmatch(text) is None or "#" in text or not text.isascii() or _PRINTABLE.fullmatch(text) is None:
        raise ValueError("must be auto, omit or an absolute URI without a fragment (RFC 8707 §2)")
    return text


def scope(text: str) -> str:
    """Return one scope token (RFC 6749 §3.3)."""
    if _SCOPE.fullmatch(text) is None:
        raise ValueError("is not a scope: one word, without quotes or backslashes (RFC 6749 §3.3)")
    return text


def command(text: str) -> str:
    """Return the text of a command whose words can be told apart as ``shlex.split`` does."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ValueError(f"must be exec:COMMAND, with words as in a shell ({error})") from None
    if not words or not words[0] or "\0" in text:
        raise ValueError("must be exec:COMMAND: a program and its arguments")
    return text


def keyring_name(text: str) -> str:
    """Return ``SERVICE/NAME``; the last slash parts them."""
    service, _, name = text.rpartition("/")
    if not service or not name or not text.isprintable():
        raise ValueError("must be keyring:SERVICE/NAME")
    return text
