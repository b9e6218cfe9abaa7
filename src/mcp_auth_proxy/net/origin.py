"""Where requests go: the origin of an upstream, taken apart from its URL once, at start-up."""

from dataclasses import dataclass
from urllib.parse import quote, urlsplit


@dataclass(frozen=True, slots=True)
class Origin:
    """Scheme, host and port of an upstream. The host is in ASCII, in lower case and without brackets."""

    scheme: str
    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


def split(url: str) -> tuple[Origin, bytes, bytes]:
    """Return the origin, the request target in origin-form and the Host field of an http(s) URL.

    Raises ValueError on other schemes, without a host, and with user information or a fragment.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc or "#" in url:
        raise ValueError("not an http or https URL with a host, and without user information and fragment")
    host = parts.hostname if parts.hostname.isascii() else parts.hostname.encode("idna").decode("ascii")
    default = 443 if parts.scheme == "https" else 80
    origin = Origin(parts.scheme, host, default if parts.port is None else parts.port)
    target = quote(parts.path or "/", safe="/%:@!$&'()*+,;=-._~")
    if parts.query:
        target += "?" + quote(parts.query, safe="/%:@!$&'()*+,;=-._~?")
    field = str(origin) if origin.port != default else str(origin).rpartition(":")[0]
    return origin, target.encode("ascii"), field.encode("ascii")
