"""A file that is sealed with a passphrase: scrypt (RFC 7914) makes the key, AES-256-GCM seals the content.

The file is ``magic | version (1) | log2 N (1) | r (1) | p (1) | salt (16) | nonce (12) | ciphertext and tag``, with
sizes in bytes. All that comes before the ciphertext is its associated data. Whoever sends such a file can't make
reading it cost more than 128 MiB and some seconds: the parameters are bounded.
"""

import os
import secrets
import stat
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from mcp_auth_proxy.errors import ExportRejected

MAGIC = b"mcp-auth-proxy export\n"
VERSION = 1
MAX_FILE = 256 * 2**20
"""Bytes of a file that is read: some 100,000 grants."""

_LOG_N, _R, _P = 15, 8, 3
"""32 MiB and a third of a second; a pod with little memory has to open it too."""

_LOG_N_BOUNDS, _R_BOUNDS, _P_BOUNDS = range(14, 18), range(8, 9), range(1, 5)
_SALT_BYTES, _NONCE_BYTES, _TAG_BYTES, _KEY_BYTES = 16, 12, 16, 32
_PARAMETERS = len(MAGIC) + 1
_SALT = _PARAMETERS + 3
_NONCE = _SALT + _SALT_BYTES
_HEAD = _NONCE + _NONCE_BYTES


@dataclass(frozen=True, slots=True)
class FileKey:
    """The key of one file, made from a passphrase: that takes a third of a second, so it is done ahead."""

    head: bytes
    secret: bytes = field(repr=False)

    @classmethod
    def new(cls, passphrase: str) -> "FileKey":
        """Return a key for a file that is about to be written."""
        parameters = bytes([VERSION, _LOG_N, _R, _P])
        salt, nonce = secrets.token_bytes(_SALT_BYTES), secrets.token_bytes(_NONCE_BYTES)
        head = MAGIC + parameters + salt + nonce
        return cls(head, _derive(passphrase, head))

    def seal(self, content: bytes) -> bytes:
        """Return the file with this content. To be called once: the nonce is used up then."""
        return self.head + AESGCM(self.secret).encrypt(self.head[_NONCE:], content, self.head)


def open_sealed(sealed: bytes, passphrase: str, *, name: str) -> bytes:
    """Return the content of a file. ``name`` is that of the file, for errors. Raises ExportRejected."""
    if not sealed.startswith(MAGIC):
        if MAGIC.startswith(sealed):
            raise ExportRejected(f"{name} is cut off: it is no whole export. Copy it again.")
        raise ExportRejected(f"{name} is not an export of mcp-auth-proxy.")
    if len(sealed) > len(MAGIC) and sealed[len(MAGIC)] != VERSION:
        raise ExportRejected(
            f"{name} has version {sealed[len(MAGIC)]} of the format, and this program reads version {VERSION}: use the "
            f"program that wrote it, or a newer one."
        )
    if len(sealed) < _HEAD + _TAG_BYTES:
        raise ExportRejected(f"{name} is cut off: it is no whole export. Copy it again.")
    log_n, r, p = sealed[_PARAMETERS:_SALT]
    if log_n not in _LOG_N_BOUNDS or r not in _R_BOUNDS or p not in _P_BOUNDS:
        raise ExportRejected(f"{name} is damaged: its key could not be made within bounds (scrypt N=2^{log_n}, r={r}).")
    head = sealed[:_HEAD]
    try:
        return AESGCM(_derive(passphrase, head)).decrypt(head[_NONCE:], sealed[_HEAD:], head)
    except InvalidTag:
        raise ExportRejected(
            f"{name} can't be opened: the passphrase is wrong, or the file was changed or cut off. Nothing was changed."
        ) from None


def read_file(path: Path) -> bytes:
    """Return the bytes of a file. Raises ExportRejected if it can't be read or is too large."""
    try:
        # Whoever opens a pipe would wait for its writer.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                found = file.read(MAX_FILE + 1)
            else:
                raise ExportRejected(f"{path} is not a file.")
    except OSError as error:
        raise ExportRejected(f"{path} can't be read ({error.strerror}).") from None
    if len(found) > MAX_FILE:
        raise ExportRejected(f"{path} is too large for an export.")
    return found


def _derive(passphrase: str, head: bytes) -> bytes:
    log_n, r, p = head[_PARAMETERS:_SALT]
    kdf = Scrypt(salt=head[_SALT:_NONCE], length=_KEY_BYTES, n=1 << log_n, r=r, p=p)
    return kdf.derive(passphrase.encode("utf-8", "surrogatepass"))
