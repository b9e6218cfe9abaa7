"""Decide which header fields are forwarded between client and upstream.

Heads are built from scratch, from the fields that may be forwarded, so nothing that belongs to one hop reaches another
(RFC 9110 §7.6.1).
"""

from collections.abc import Iterable
from dataclasses import dataclass

from mcp_auth_proxy.errors import OwnSession, SessionNotFound
from mcp_auth_proxy.net.http_head import HOPS, MAX_HOPS, Fields, Headers, check_lines, encode_fields
from mcp_auth_proxy.proxy import session_ids
from mcp_auth_proxy.proxy.session_ids import SessionIds
from mcp_auth_proxy.rpc import events

_COUNTS = {b"%d" % count: count for count in range(MAX_HOPS)}

_HOP_BY_HOP = frozenset(
    {b"connection", b"content-length", b"keep-alive", b"te", b"trailer", b"transfer-encoding", b"upgrade"}
)
"""Fields of one connection, and those of the framing, which the proxy writes itself. Also ``proxy-*``."""

_NOT_FORWARDED = _HOP_BY_HOP | {
    b"authorization",
    b"cf-connecting-ip",
    b"cf-connecting-ipv6",
    b"client-ip",
    b"cookie",
    b"cookie2",
    b"dpop",
    b"expect",
    b"fastly-client-ip",
    b"forwarded",
    b"forwarded-for",
    b"host",
    b"http2-settings",
    HOPS,
    b"origin",
    b"remote-addr",
    b"remote-user",
    b"true-client-ip",
    b"x-authenticated-user",
    b"x-azure-clientip",
    b"x-client-ip",
    b"x-cluster-client-ip",
    b"x-envoy-external-address",
    b"x-forwarded",
    b"x-originating-ip",
    b"x-real-ip",
    b"x-remote-addr",
    b"x-remote-ip",
    b"x-remote-user",
    b"x-webauth-user",
    # They would replace the target or the method, which the proxy has checked.
    b"x-envoy-original-path",
    b"x-http-method",
    b"x-http-method-override",
    b"x-method-override",
    b"x-original-host",
    b"x-original-method",
    b"x-original-uri",
    b"x-original-url",
    b"x-rewrite-url",
}
"""Fields that are meant for the proxy, or that a client can't be trusted with. Also those that begin as one of
``_NOT_FORWARDED_PREFIXES``."""

_DROPPED_UNCHECKED = _NOT_FORWARDED - {b"connection"}
"""The fields that are dropped whatever their value is."""

_NOT_FORWARDED_PREFIXES = (
    b"proxy-",
    b"ssl-client-",
    b"wl-proxy-",
    b"x-accel-",
    b"x-amzn-oidc-",
    b"x-client-cert",
    b"x-forwarded-",
    b"x-goog-authenticated-user-",
    b"x-ms-client-principal",
    b"x-sendfile",
    b"x-ssl-",
)
"""What a web server or cloud platform before the upstream says of a client and its certificate. ``x-accel-mapping`` and
``x-sendfile-type`` tell an application how to let the web server send a file."""

_FORWARDED_UNCHECKED = frozenset(
    {
        b"accept",
        b"accept-encoding",
        b"accept-language",
        b"content-type",
        b"last-event-id",
        b"mcp-method",
        b"mcp-name",
        b"mcp-protocol-version",
        b"mcp-session-id",
        b"sec-fetch-mode",
        b"traceparent",
        b"tracestate",
        b"user-agent",
    }
)
"""Usual fields: they pass after one look-up."""

_NOT_RETURNED = _HOP_BY_HOP | {
    # For the OAuth client of this request, which is the proxy.
    b"dpop-nonce",
    HOPS,
    b"set-cookie",
    b"set-cookie2",
    b"www-authenticate",
    # Policies for the upstream's origin: a browser would apply them to the proxy's.
    b"alt-svc",
    b"clear-site-data",
    b"expect-ct",
    b"nel",
    b"public-key-pins",
    b"public-key-pins-report-only",
    b"report-to",
    b"reporting-endpoints",
    b"service-worker-allowed",
    b"strict-transport-security",
}

_NOT_RETURNED_PREFIXES = (b"proxy-", b"x-accel-", b"x-lighttpd-", b"x-litespeed-", b"x-reproxy-", b"x-sendfile")
"""All but the first are commands to a web server in front of the proxy: to send one of its files, or the response of
another address, instead of this response."""

UNBUFFERED = (b"x-accel-buffering", b"no")
"""The one command that passes, and that every event stream gets: nginx would keep events back. It reveals nothing."""

_RETURNED_UNCHECKED = frozenset(
    {b"content-length", b"content-encoding", b"date", b"mcp-session-id", b"server", b"vary"}
)
"""Usual fields: they pass after one look-up."""

_SIMPLE_CONNECTION = frozenset({b"keep-alive", b"close", b"Keep-Alive", b"Close"})

_CANONICAL = bytes(ord(chr(byte).lower()) if byte < 128 and chr(byte).isalnum() else ord("-") for byte in range(256))
"""Servers that pass fields on as environment variables (RFC 3875 §4.1.18) distinguish letters and digits only: for them
``x_forwarded_for`` is ``x-forwarded-for``."""

NO_STORE = (b"cache-control", b"no-store")

INERT = (b"content-security-policy", b"default-src 'none'; sandbox")
"""For responses that a browser could show as a page: its script would run in the proxy's origin and could call every
other server. If the upstream sends a policy too, both apply."""

_NO_PAGES = frozenset({b"application/json", b"text/event-stream"})

_LAST_EVENT_ID = b"last-event-id"


@dataclass(frozen=True, slots=True, eq=False)
class FieldRules:
    """What is forwarded depends on this besides the fields: whose request it is, and of which account of a server."""

    credentials: frozenset[bytes] = frozenset()
    """Names of the fields with credentials of callers: they are dropped, in any spelling."""
    sessions: SessionIds | None = None
    """None if there is one caller only: then session ids pass as they are."""
    shared: bool = False
    """Whether other callers use the same token: without a session, the server can't tell whose events it repeats."""


_EVERYBODY = object()
"""In place of rules: a response has the same fields under all of them."""

ONE_CALLER = FieldRules()
"""The rules if callers are not identified."""


def canonical_name(name: bytes) -> bytes:
    """Return the one spelling of a field name, in lower case, that stands for all that a server could confuse."""
    return name.translate(_CANONICAL).strip(b"-")


def request_head(
    method: bytes,
    target: bytes,
    host: bytes,
    fields: Fields,
    authorization: bytes | None,
    content_length: int | None,
    proof: bytes | None = None,
    *,
    rules: FieldRules = ONE_CALLER,
) -> bytes:
    """Return the head of an upstream request, with the client's ``fields`` (see ``request_headers``).

    ``content_length`` is None for a request without a body; ``proof`` belongs to a token that is bound to a key (RFC
    9449 §7). Raises SessionNotFound, and ValueError if a part would break out of its line; the request parser lets none
    through.
    """
    forwarded = encoded_request_fields(fields, rules)
    start = b"%b %b HTTP/1.1\r\nhost: %b\r\n" % (method, target, host)
    end = b"\r\n" if content_length is None else b"content-length: %d\r\n\r\n" % content_length
    count = 3 if content_length is None else 4
    if proof is not None:
        end = b"dpop: %b\r\n%b" % (proof, end)
        count += 1
    if authorization is not None:
        end = b"authorization: %b\r\n%b" % (authorization, end)
        count += 1
    check_lines(start + end, count)
    if target.find(b" ") >= 0:
        raise ValueError("the request target holds a space")
    return start + forwarded + end


def encoded_request_fields(fields: Fields, rules: FieldRules) -> bytes:
    """Return the fields of a client's request that go to the upstream, encoded.

    Raises SessionNotFound, and ValueError if a field holds a line break.
    """
    forwarded = fields.forwarded
    if forwarded is None or fields.forwarded_for is not rules:
        hops = (HOPS, b"%d" % (_hops(fields.headers) + 1))
        fields.forwarded = forwarded = encode_fields([*request_headers(fields.headers, rules), hops])
        fields.forwarded_for = rules
    return forwarded


def is_in_loop(fields: Fields) -> bool:
    """Return whether a request has come through ``MAX_HOPS`` proxies already. Call it before ``request_head``."""
    # What was forwarded once was counted then.
    return fields.forwarded is None and _hops(fields.headers) >= MAX_HOPS


def _hops(headers: Headers) -> int:
    """Return the hop count of a request. A count that no proxy wrote, or a second one, is ``MAX_HOPS``."""
    values = [value for name, value in headers if name == HOPS]
    if not values:
        return 0
    return _COUNTS.get(values[0], MAX_HOPS) if len(values) == 1 else MAX_HOPS


def request_headers(headers: Headers, rules: FieldRules = ONE_CALLER) -> Headers:
    """Return the fields of a client's request that go to the upstream, names in lower case as they came.

    Dropped are hop-by-hop fields and those that ``Connection`` lists, framing, ``Expect``, and every field about who
    the client is or claims to be, in any spelling that a server could read as one. The rest passes unchanged and in
    order, ``Via`` too. If there are several callers, their credentials are dropped, and the session id is checked and
    stripped of its signature. Raises SessionNotFound; OwnSession if the server does not know the session.
    """
    kept: Headers = []
    listed: set[bytes] | None = None
    for field in headers:
        name = field[0]
        if name in _FORWARDED_UNCHECKED:
            kept.append(field)
        elif name not in _DROPPED_UNCHECKED:
            key = canonical_name(name)
            if key not in _NOT_FORWARDED and not key.startswith(_NOT_FORWARDED_PREFIXES):
                kept.append(field)
            elif key == b"connection" and field[1] not in _SIMPLE_CONNECTION:
                listed = _list_names(listed, field[1])
    if listed:
        kept = [field for field in kept if field[0] not in listed]
    if rules.sessions is not None:
        kept = _of_one_caller(kept, rules, rules.sessions)
    for at, (name, value) in enumerate(kept):
        if name == session_ids.FIELD and value.startswith(session_ids.OWN_PREFIX):
            session_id = session_ids.server_id(value)
            if session_id is None:
                raise OwnSession(value)
            kept[at] = name, session_id
    return kept


def _of_one_caller(headers: Headers, rules: FieldRules, sessions: SessionIds) -> Headers:
    """Return the fields without credentials and without what belongs to another caller. Raises SessionNotFound."""
    kept: Headers = []
    in_session = False
    credentials = rules.credentials
    for field in headers:
        name = field[0]
        if name == session_ids.FIELD:
            session_id = sessions.open(field[1])
            if session_id is None:
                raise SessionNotFound
            kept.append((name, session_id))
            in_session = True
        else:
            key = name if name in _FORWARDED_UNCHECKED else canonical_name(name)
            if key not in credentials and key != session_ids.FIELD:
                kept.append(field)
    if rules.shared and not in_session:
        return [field for field in kept if canonical_name(field[0]) != _LAST_EVENT_ID]
    return kept


def encoded_response_fields(fields: Fields, rules: FieldRules = ONE_CALLER) -> bytes:
    """Return the fields of an upstream response that go to the client, encoded, without Content-Length.

    Raises ValueError if a field holds a line break; the parser lets none through.
    """
    forwarded, made_for = fields.forwarded, fields.forwarded_for
    if forwarded is None or (made_for is not rules and made_for is not _EVERYBODY):
        fields.forwarded = forwarded = encode_fields(response_headers(fields.headers, rules))
        # Only a session id is not the same for all callers, who take turns on the connections to a server.
        in_session = any(name.lower() == session_ids.FIELD for name, _ in fields.headers)
        fields.forwarded_for = rules if in_session else _EVERYBODY
    return forwarded


def is_event_stream(fields: Fields) -> bool:
    """Return whether a response is an event stream."""
    if fields.events is None:
        fields.events = events.is_stream(fields.headers)
    return fields.events


def is_plain(fields: Fields) -> bool:
    """Return whether the content of a response has no coding (RFC 9110 §8.4)."""
    if fields.plain is None:
        fields.plain = not any(
            name == b"content-encoding" and value.lower() != b"identity" for name, value in fields.headers
        )
    return fields.plain


def response_headers(raw: Iterable[tuple[bytes, bytes]], rules: FieldRules = ONE_CALLER) -> Headers:
    """Return the fields of an upstream response that go to the client, names in lower case.

    Dropped are hop-by-hop fields and those that ``Connection`` lists, challenges, cookies, policies for a whole origin
    (HSTS, Alt-Svc, reporting), and commands to a web server in front of the proxy, in any spelling that could be read
    as one. ``Content-Length`` stays, because it is there only if it frames the body; CORS fields stay, but see
    ``without_cors``.
    ``Cache-Control: no-store`` is added if the upstream has no ``Cache-Control``: the response was made for the proxy's
    token, of which caches between proxy and client know nothing (RFC 9111 §3.5). A response that is neither JSON nor
    events is made inert, in case a browser was sent here. If there are several callers, session ids are signed.
    """
    kept: Headers = []
    listed: set[bytes] | None = None
    cacheable = False
    types = 0
    inert = False
    is_events = unbuffered = False
    for field in raw:
        if field[0] in _RETURNED_UNCHECKED:
            kept.append(field)
            continue
        name, value = field[0].lower(), field[1]
        key = canonical_name(name)
        if key in _NOT_RETURNED or key.startswith(_NOT_RETURNED_PREFIXES):
            if name == b"content-length":
                kept.append((name, value))
            elif (name, value.lower()) == UNBUFFERED:
                unbuffered = True
                kept.append((name, value))
            elif key == b"connection" and value not in _SIMPLE_CONNECTION:
                listed = _list_names(listed, value)
            continue
        if name == b"content-type":
            types += 1
            is_events = is_events or value.lower().startswith(events.CONTENT_TYPE)
            inert = inert or (value not in _NO_PAGES and value.partition(b";")[0].strip().lower() not in _NO_PAGES)
        elif name == b"cache-control":
            cacheable = True
        kept.append((name, value))
    if listed:
        kept = [pair for pair in kept if pair[0] not in listed or pair[0] == b"content-length"]
        cacheable = cacheable and b"cache-control" not in listed
        inert = inert or b"content-type" in listed
    if not cacheable:
        kept.append(NO_STORE)
    if is_events and not unbuffered:
        kept.append(UNBUFFERED)
    if inert or types != 1:  # without a type, or with two, browsers guess
        kept.append(INERT)
    sessions = rules.sessions
    return [
        (name, session_ids.for_client(value, sessions) if name == session_ids.FIELD else value) for name, value in kept
    ]


def without_cors(headers: Headers) -> Headers:
    """Return response fields without those of CORS: the proxy itself says which pages may read a response.

    Two answers to that question, or ``*`` beside an origin, are none to a browser (WHATWG Fetch §4.10).
    """
    return [field for field in headers if not field[0].startswith(b"access-control-")]


def _list_names(listed: set[bytes] | None, value: bytes) -> set[bytes]:
    """Add the field names of one ``Connection`` value (RFC 9110 §7.6.1) to those known."""
    names = listed or set()
    names.update(name.strip().lower() for name in value.split(b","))
    names.discard(b"")
    return names
