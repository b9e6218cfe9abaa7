"""Seals secrets for the store: AES-256-GCM, bound to the place where the value stands (table, row, column).

A sealed value is ``version (1) | key id (4) | nonce (12) | ciphertext and tag``. The associated data covers
version, key id and place, so a value that was moved, or whose key id was changed, does not open.
"""

import base64
import binascii
import hashlib
import os
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from mcp_auth_proxy.config.settings import KeySource, StoreSettings
from mcp_auth_proxy.errors import ConfigError, DecryptionError, StoreRejected
from mcp_auth_proxy.store import files

_VERSION = b"\x01"
_KEY_BYTES = 32
_ID_BYTES = 4
_NONCE_BYTES = 12
_TAG_BYTES = 16
_HEAD = len(_VERSION) + _ID_BYTES + _NONCE_BYTES
_KEY_TEXT = re.compile(r"[A-Za-z0-9+/_-]{43}=?")
_MAKE = "make one with: openssl rand -base64 32"


@dataclass(frozen=True, slots=True)
class Key:
    """A store key. ``id`` is a public fingerprint, 8 hex digits."""

    id: str
    secret: bytes = field(repr=False)

    @classmethod
    def of(cls, secret: bytes) -> "Key":
        """The key made of 32 bytes."""
        fingerprint = hashlib.sha256(b"mcp-auth-proxy store key id\0" + secret)
        return cls(fingerprint.hexdigest()[: 2 * _ID_BYTES], secret)


def load_key(source: KeySource, environ: Mapping[str, str] = os.environ) -> Key:
    """The key of ``env:NAME`` or ``file:PATH``: 32 bytes as base64 or base64url text. Raises StoreRefused."""
    try:
        text = environ[source.name] if source.kind == "env" else Path(source.name).read_text("ascii")
    except KeyError:
        raise StoreRejected(f"The store key {source} is not set; {_MAKE}") from None
    except OSError as error:
        raise StoreRejected(f"The store key {source} can't be read ({error.strerror}).") from None
    except UnicodeDecodeError:
        text = ""
    text = text.strip()
    try:
        secret = base64.urlsafe_b64decode(text.rstrip("=") + "=") if _KEY_TEXT.fullmatch(text) else b""
    except binascii.Error:
        secret = b""
    if len(secret) != _KEY_BYTES:
        raise StoreRejected(
            f"The store key {source} is not a key: it must be 32 bytes as base64 text. A store that "
            f"exists needs the key it was made with; for a new store, {_MAKE}"
        )
    return Key.of(secret)


def key_faults(settings: StoreSettings) -> list[ConfigError]:
    """Return what is wrong with the keys of a store; one that is yet to be made is not."""
    faults = []
    for source in settings.keys:
        if settings.default_key and not Path(source.name).exists():
            continue
        try:
            load_key(source)
        except StoreRejected as error:
            faults.append(ConfigError("store.keys", str(error)))
    return faults


def generate_key_file(path: Path) -> bool:
    """Makes a key file, 0600; False when there is one by now. Raises OSError."""
    draft = files.temporary_path(path)
    files.create(draft, base64.b64encode(secrets.token_bytes(_KEY_BYTES)) + b"\n")
    return files.link_into_place(draft, path)


class Cipher:
    """Seals under the first key, opens under all."""

    def __init__(self, keys: Sequence[Key]) -> None:
        self._first = keys[0].id
        self._keys = {key.id: AESGCM(key.secret) for key in keys}

    @property
    def key_ids(self) -> tuple[str, ...]:
        """The ids of the keys; the first one seals."""
        return tuple(self._keys)

    def seal(self, plaintext: str, *, table: str, row: str, column: str, key_id: str | None = None) -> bytes:
        """The sealed form of a text for one place; under the first key unless another is named."""
        key_id = key_id or self._first
        nonce = secrets.token_bytes(_NONCE_BYTES)
        sealed = self._keys[key_id].encrypt(nonce, plaintext.encode(), _place(table, row, column, key_id))
        return _VERSION + bytes.fromhex(key_id) + nonce + sealed

    def open(self, sealed: bytes, *, table: str, row: str, column: str) -> str:
        """The text that was sealed for this place. Raises SealBroken, which never tells the value."""
        place = f"{table}.{column} of row {row}"
        if len(sealed) < _HEAD + _TAG_BYTES or sealed[:1] != _VERSION:
            raise DecryptionError(f"{place} is damaged: not a sealed value.")
        key_id = sealed[1 : 1 + _ID_BYTES].hex()
        key = self._keys.get(key_id)
        if key is None:
            raise DecryptionError(f"{place} is sealed under key {key_id}, which is not in store.keys.")
        nonce, content = sealed[1 + _ID_BYTES : _HEAD], sealed[_HEAD:]
        try:
            return key.decrypt(nonce, content, _place(table, row, column, key_id)).decode()
        except (InvalidTag, UnicodeDecodeError):
            raise DecryptionError(f"{place} does not open: it was damaged, or moved there from elsewhere.") from None


def _place(*parts: str) -> bytes:
    # Each part with its length, so that no two places have the same bytes.
    encoded = [part.encode() for part in ("mcp-auth-proxy seal 1", *parts)]
    return b"".join(len(part).to_bytes(4, "big") + part for part in encoded)
