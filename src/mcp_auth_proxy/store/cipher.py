"""Seal secrets with AES-256-GCM, each bound to its place in the store (table, row, column).

A sealed value is ``version (1) | key id (4) | nonce (12) | ciphertext and tag``, in bytes. The associated data covers
version, key id and place, so a value that was moved, or whose key id was changed, can't be decrypted.
"""

import base64
import binascii
import hashlib
import importlib
import os
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from mcp_auth_proxy.config.settings import KeySource, StoreSettings
from mcp_auth_proxy.errors import ConfigError, DecryptionError, KeyRejected
from mcp_auth_proxy.store import files

VERSION = 2
"""The version of new seals."""

BEFORE_SEALED_ROWS = 1
"""The version of seals in stores whose rows were not yet sealed as a whole, up to schema 5.

Only a migration opens them. Otherwise a store that is made to look old would be migrated again, and its rows, changed
at will, sealed.
"""

_KEY_BYTES = 32
_ID_BYTES = 4
_NONCE_BYTES = 12
_TAG_BYTES = 16
_HEAD = 1 + _ID_BYTES + _NONCE_BYTES
_MAX_KEY_TEXT = 4096
_KEY_TEXT = re.compile(r"[A-Za-z0-9+/_-]{43}=?")
_MAKE = "make one with: openssl rand -base64 32"
_KEY_SOURCES = "mcp_auth_proxy.store.key_sources"


@dataclass(frozen=True, slots=True)
class Key:
    """A store key. ``id`` is a public fingerprint, 8 hex digits."""

    id: str
    secret: bytes = field(repr=False)

    @classmethod
    def of(cls, secret: bytes) -> "Key":
        """Return the key that 32 bytes make."""
        fingerprint = hashlib.sha256(b"mcp-auth-proxy store key id\0" + secret)
        return cls(fingerprint.hexdigest()[: 2 * _ID_BYTES], secret)


def load_keys(settings: StoreSettings, environ: Mapping[str, str] = os.environ) -> tuple[Key, ...]:
    """Load the keys of a store. Raises KeyRejected, KeyUnavailable. May take seconds: call it in a thread."""
    private = settings.default_key and not settings.keys_named
    return tuple(load_key(source, environ, private=private) for source in settings.keys)


def load_key(source: KeySource, environ: Mapping[str, str] = os.environ, *, private: bool = False) -> Key:
    """Load a key from its source: 32 bytes as base64 or base64url text. Raises KeyRejected, KeyUnavailable.

    ``private``: the file must be its user's alone.
    """
    try:
        text = _text(source, environ, private=private)
    except KeyError:
        raise KeyRejected(f"The store key {source} is not set; {_MAKE}") from None
    except OSError as error:
        raise KeyRejected(f"The store key {source} can't be read ({error.strerror}).") from None
    except UnicodeDecodeError:
        text = ""
    text = text.strip()
    try:
        secret = base64.urlsafe_b64decode(text.rstrip("=") + "=") if _KEY_TEXT.fullmatch(text) else b""
    except binascii.Error:
        secret = b""
    if len(secret) != _KEY_BYTES:
        raise KeyRejected(
            f"The store key {source} is not a key: it must be 32 bytes as base64 text. An existing "
            f"store needs the key that it was made with; for a new store, {_MAKE}"
        )
    return Key.of(secret)


def _text(source: KeySource, environ: Mapping[str, str], *, private: bool) -> str:
    match source.kind:
        case "env":
            return environ[source.name]
        case "file":
            return _read(source, private=private)
        case "exec":
            text: str = importlib.import_module(_KEY_SOURCES).from_command(source, environ)
        case "keyring":
            text = importlib.import_module(_KEY_SOURCES).from_keyring(source)
    return text


def _read(source: KeySource, *, private: bool) -> str:
    with Path(source.name).open(encoding="ascii") as file:
        # The file that is read, whatever the path leads to a moment later.
        if private and (problem := files.exposure(os.fstat(file.fileno()))):
            raise KeyRejected(
                f"The store key {source} {problem}. It must be this user's alone: chmod 600 {source.name} (and chown, "
                f"if it is another user's). If that is intended, name the file in the key store.keys."
            )
        return file.read(_MAX_KEY_TEXT)


def key_warnings(settings: StoreSettings) -> list[str]:
    """Return what is dangerous about the key files that ``store.keys`` names."""
    warnings = []
    for source in settings.keys if settings.keys_named else ():
        try:
            found = os.stat(source.name) if source.kind == "file" else None
        except OSError:
            continue
        if found is not None and (problem := files.exposure(found, reading=False)):
            warnings.append(f"The store key {source} {problem}, who could replace it: chmod 600 {source.name}")
    return warnings


def key_errors(settings: StoreSettings) -> list[ConfigError]:
    """Return the errors in the keys of a store. A default key file may be missing: it is created at the first start.

    No command is run, and no keyring is asked.
    """
    errors = []
    for source in settings.keys:
        if source.kind in ("exec", "keyring") or (settings.default_key and not Path(source.name).exists()):
            continue
        try:
            load_keys(replace(settings, keys=(source,)))
        except KeyRejected as error:
            errors.append(ConfigError("store.keys", str(error)))
    return errors


def generate_key_file(path: Path) -> bool:
    """Create a key file, 0600. Return False if there already is one. Raises OSError."""
    draft = files.temporary_path(path)
    files.create(draft, base64.b64encode(secrets.token_bytes(_KEY_BYTES)) + b"\n")
    return files.link_into_place(draft, path)


class Cipher:
    """Seal with the first key, open with any of them."""

    def __init__(self, keys: Sequence[Key]) -> None:
        self.given = tuple(key.id for key in keys)
        """The ids of the keys as they were given: a key may be there twice."""
        self._first = keys[0].id
        self._keys = {key.id: AESGCM(key.secret) for key in keys}

    @property
    def key_ids(self) -> tuple[str, ...]:
        """The ids of the keys; the first one is used to seal."""
        return tuple(self._keys)

    def seal(self, plaintext: str, *, table: str, row: str, column: str, key_id: str | None = None) -> bytes:
        """Encrypt a text for one place, with the first key unless ``key_id`` names another."""
        key_id = key_id or self._first
        nonce = secrets.token_bytes(_NONCE_BYTES)
        sealed = self._keys[key_id].encrypt(nonce, plaintext.encode(), _place(VERSION, table, row, column, key_id))
        return bytes([VERSION]) + bytes.fromhex(key_id) + nonce + sealed

    def open(self, sealed: bytes, *, table: str, row: str, column: str, version: int = VERSION) -> str:
        """Decrypt a text that was sealed for this place. Raises DecryptionError, which never contains the value."""
        place = f"{table}.{column} of row {row}"
        if len(sealed) < _HEAD + _TAG_BYTES or sealed[0] != version:
            raise DecryptionError(f"{place} is damaged: not a sealed value.")
        key_id = sealed[1 : 1 + _ID_BYTES].hex()
        key = self._keys.get(key_id)
        if key is None:
            raise DecryptionError(f"{place} is sealed with key {key_id}, which is not in store.keys.")
        nonce, content = sealed[1 + _ID_BYTES : _HEAD], sealed[_HEAD:]
        try:
            return key.decrypt(nonce, content, _place(version, table, row, column, key_id)).decode()
        except (InvalidTag, UnicodeDecodeError):
            raise DecryptionError(
                f"{place} can't be decrypted: it was damaged, or moved there from elsewhere."
            ) from None


def _place(version: int, *parts: str) -> bytes:
    # The length of each part comes first, so that no two places give the same bytes.
    encoded = [part.encode() for part in (f"mcp-auth-proxy seal {version}", *parts)]
    return b"".join(len(part).to_bytes(4, "big") + part for part in encoded)
