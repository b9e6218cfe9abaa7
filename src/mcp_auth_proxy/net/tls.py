"""The client side of TLS: which certificates are trusted, and why a handshake failed."""

import ssl
from pathlib import Path

from mcp_auth_proxy.errors import ConfigError, ConfigurationError

_NAME_MISMATCHES = (62, 64)
"""X509_V_ERR_HOSTNAME_MISMATCH and X509_V_ERR_IP_ADDRESS_MISMATCH of OpenSSL."""

_PLAIN_ANSWERS = ("WRONG_VERSION_NUMBER", "PACKET_LENGTH_TOO_LONG", "RECORD_LAYER_FAILURE")
"""What OpenSSL calls a text where a TLS record should be; it differs by version, and by the first bytes."""


def client_context(ca_bundle: Path | None) -> ssl.SSLContext:
    """Return a context that trusts the system's store, ``SSL_CERT_FILE`` and ``ca_bundle``, and speaks HTTP/1.1.

    It takes some megabytes, so a process should have one. Raises ConfigurationError if ``ca_bundle`` can't be used.
    """
    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    if ca_bundle is not None:
        try:
            context.load_verify_locations(cafile=ca_bundle)
        except OSError as error:
            reason = "it holds no PEM certificate" if isinstance(error, ssl.SSLError) else error.strerror
            raise ConfigurationError(
                [ConfigError("outbound.ca_bundle", f"{ca_bundle} can't be used: {reason}")]
            ) from None
    return context


def failure_reason(error: ssl.SSLError) -> str:
    """Return in words why a handshake failed, and the key that would help if there is one."""
    if error.reason in _PLAIN_ANSWERS:
        return "TLS failed: the port answers without TLS; try http:// if that is intended"
    if not isinstance(error, ssl.SSLCertVerificationError):
        return f"TLS failed ({(error.reason or 'unknown reason').lower().replace('_', ' ')})"
    if error.verify_code in _NAME_MISMATCHES:
        return "its certificate is for another name"
    detail = str(error.verify_message or "unknown issuer")
    return f"its certificate is not trusted ({detail}; outbound.ca_bundle names further authorities)"
