"""How connections are opened: addresses, TLS, forward proxies, and the errors if none can be opened."""

import asyncio
import contextlib
import datetime
import ipaddress
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from fakes.raw_server import Peer, RawServer, answers, ok
from mcp_auth_proxy.errors import ConfigurationError, UpstreamUnreachable
from mcp_auth_proxy.net import dial, resolver
from mcp_auth_proxy.net.addresses import AddressPolicy, AddressRefused
from mcp_auth_proxy.net.dial import Dialer
from mcp_auth_proxy.net.http_client import HttpClient
from mcp_auth_proxy.net.resolver import Resolve
from mcp_auth_proxy.net.urls import Origin

REQUEST = b"GET /mcp HTTP/1.1\r\nhost: h\r\n\r\n"


class Authority:
    """A certificate authority for one test run."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Throw-away CA")])
        usage = x509.KeyUsage(True, False, False, False, False, True, True, False, False)
        builder = self._builder(self._name, self._key).add_extension(x509.BasicConstraints(True, 0), True)
        certificate = builder.add_extension(usage, True).sign(self._key, hashes.SHA256())
        self.bundle = folder / "ca.pem"
        self.bundle.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))

    def server(self, *names: str) -> ssl.SSLContext:
        """A server's context with a certificate for these names and addresses."""
        key = ec.generate_private_key(ec.SECP256R1())
        alternatives: list[x509.GeneralName] = []
        for name in names:
            with contextlib.suppress(ValueError):
                alternatives.append(x509.IPAddress(ipaddress.ip_address(name)))
                continue
            alternatives.append(x509.DNSName(name))
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0])])
        certificate = (
            self._builder(subject, key)
            .add_extension(x509.SubjectAlternativeName(alternatives), False)
            .sign(self._key, hashes.SHA256())
        )
        path = self._folder / f"{len(list(self._folder.iterdir()))}.pem"
        path.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
            + certificate.public_bytes(serialization.Encoding.PEM)
        )
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(path)
        context.set_alpn_protocols(["h2", "http/1.1"])
        return context

    def _builder(self, subject: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
        now = datetime.datetime.now(datetime.UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=1))
        )


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"))


Get = Callable[..., Awaitable[bytes]]


@pytest.fixture
async def get() -> AsyncIterator[Get]:
    """Sends a GET to an origin through a client of its own, and returns the body."""
    opened: list[HttpClient] = []

    async def get(
        origin: Origin,
        *,
        ca: Path | None = None,
        environ: dict[str, str] | None = None,
        timeout: float = 5.0,
        resolve: Resolve = resolver.resolve,
    ) -> bytes:
        dialer = Dialer(ca_bundle=ca, environ=environ or {}, resolve=resolve)
        upstream = HttpClient(dialer, connections_per_origin=5, connect_timeout=timeout)
        opened.append(upstream)
        response = await upstream.send(origin, REQUEST, method=b"GET", head_timeout=5)
        return await response.read()

    yield get
    for upstream in opened:
        await upstream.aclose()


async def test_an_upstream_with_a_trusted_certificate_is_used_over_http_1_1(authority: Authority, get: Get) -> None:
    spoken: list[str | None] = []

    async def script(peer: Peer) -> None:
        spoken.append(peer.alpn)
        await answers(ok())(peer)

    async with RawServer(script, authority.server("127.0.0.1")) as server:
        assert await get(Origin("https", "127.0.0.1", server.port), ca=authority.bundle) == b"hi"
        assert spoken == ["http/1.1"]


async def test_ssl_cert_file_is_trusted(authority: Authority, get: Get, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.bundle))
    async with RawServer(answers(ok()), authority.server("127.0.0.1")) as server:
        assert await get(Origin("https", "127.0.0.1", server.port)) == b"hi"


async def test_a_certificate_of_an_unknown_authority_is_refused(authority: Authority, get: Get) -> None:
    async with RawServer(answers(ok()), authority.server("127.0.0.1")) as server:
        reason = r"its certificate is not trusted .*outbound\.ca_bundle"
        with pytest.raises(UpstreamUnreachable, match=rf"127\.0\.0\.1:{server.port} can't be reached: {reason}"):
            await get(Origin("https", "127.0.0.1", server.port))
        assert server.requests == []


@pytest.mark.parametrize("names", [["other.example"], ["127.0.0.2"]])
async def test_a_certificate_for_another_name_is_refused(authority: Authority, get: Get, names: list[str]) -> None:
    async with RawServer(answers(ok()), authority.server(*names)) as server:
        with pytest.raises(UpstreamUnreachable, match="its certificate is for another name"):
            await get(Origin("https", "127.0.0.1", server.port), ca=authority.bundle)
        assert server.requests == []


async def test_an_upstream_that_does_not_speak_tls_is_named(get: Get, authority: Authority) -> None:
    async def script(peer: Peer) -> None:
        await peer.send(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        await peer.until_gone()

    async with RawServer(script) as server:
        with pytest.raises(UpstreamUnreachable, match=r"answers without TLS; try http://"):
            await get(Origin("https", "127.0.0.1", server.port), ca=authority.bundle)


@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_a_refused_connection_says_so(get: Get, scheme: str) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        with pytest.raises(UpstreamUnreachable) as caught:
            await get(Origin(scheme, "127.0.0.1", port))
    assert str(caught.value) == f"127.0.0.1:{port} can't be reached: connection refused."


async def test_a_name_that_does_not_exist_says_so(get: Get) -> None:
    with pytest.raises(UpstreamUnreachable, match=r"no-such-host\.invalid:80 can't be reached: the name no-such-host"):
        await get(Origin("http", "no-such-host.invalid", 80))


async def test_connecting_has_one_deadline_that_includes_tls(get: Get, authority: Authority) -> None:
    async def script(peer: Peer) -> None:
        await peer.until_gone()

    async with RawServer(script) as server:
        with pytest.raises(UpstreamUnreachable, match=r"no connection within 0\.1 s"):
            await get(Origin("https", "127.0.0.1", server.port), ca=authority.bundle, timeout=0.1)
        async with asyncio.timeout(5):
            await server.peers[0].gone.wait()


async def test_the_look_up_is_part_of_the_one_deadline(get: Get, authority: Authority) -> None:
    async def slow(host: str, port: int) -> Sequence[str]:
        await asyncio.sleep(0.9)
        return ("127.0.0.1",)

    async def silent(peer: Peer) -> None:
        await peer.until_gone()

    async with RawServer(silent) as server:
        origin = Origin("https", "slow.example", server.port)
        async with asyncio.timeout(1.6):
            with pytest.raises(UpstreamUnreachable, match=r"no connection within 1 s"):
                await get(origin, ca=authority.bundle, timeout=1.0, resolve=slow)
        # A look-up that takes all of the time is named as the reason.
        async with asyncio.timeout(0.7):
            with pytest.raises(UpstreamUnreachable, match=r"the name slow\.example can't be looked up now"):
                await get(origin, ca=authority.bundle, timeout=0.1, resolve=slow)


async def test_connecting_may_have_a_share_of_the_deadline_that_begins_after_the_look_up() -> None:
    async def slow(host: str, port: int) -> Sequence[str]:
        await asyncio.sleep(0.3)
        return ("127.0.0.1",)

    async def open_tls(server: RawServer, timeout: float) -> asyncio.Protocol:
        dialer = Dialer(environ={}, resolve=slow)
        origin = Origin("https", "slow.example", server.port)
        return await dialer.open(origin, lambda _: asyncio.Protocol(), timeout=timeout, connect_timeout=0.2)

    async def silent(peer: Peer) -> None:
        await peer.until_gone()

    async with RawServer(silent) as server, asyncio.timeout(5):
        with pytest.raises(UpstreamUnreachable, match=r"no connection within 0\.2 s"):
            await open_tls(server, 5)
        assert len(server.peers) == 1  # the look-up did not use up the time to connect
        with pytest.raises(UpstreamUnreachable, match=r"no connection within 0\.4 s"):
            await open_tls(server, 0.4)


async def test_a_cancelled_tls_handshake_closes_the_socket(get: Get, authority: Authority) -> None:
    async def script(peer: Peer) -> None:
        started.set()
        await peer.until_gone()

    started = asyncio.Event()
    async with RawServer(script) as server:
        asking = asyncio.ensure_future(get(Origin("https", "127.0.0.1", server.port), ca=authority.bundle))
        await started.wait()
        asking.cancel()
        async with asyncio.timeout(5):
            await server.peers[0].gone.wait()
        with pytest.raises(asyncio.CancelledError):
            await asking


def test_an_unusable_ca_bundle_is_a_configuration_error(tmp_path: Path) -> None:
    empty = tmp_path / "empty.pem"
    empty.write_text("")
    for path, reason in ((tmp_path / "absent.pem", "No such file"), (empty, "no PEM certificate")):
        with pytest.raises(ConfigurationError, match=rf"outbound\.ca_bundle: .*{reason}"):
            Dialer(ca_bundle=path, environ={})


def resolving(*addresses: str) -> Resolve:
    """A resolver that knows one answer."""

    async def resolve(host: str, port: int) -> Sequence[str]:
        return addresses

    return resolve


@pytest.mark.parametrize("dead", ["::1", "127.0.0.3"])
async def test_the_next_address_is_tried_if_one_refuses(get: Get, dead: str) -> None:
    async with RawServer(answers(ok())) as server:
        found = await get(Origin("http", "two.example", server.port), resolve=resolving(dead, "127.0.0.1"))
        assert found == b"hi"


async def test_the_next_address_is_tried_while_one_does_not_answer(get: Get) -> None:
    async with RawServer(answers(ok())) as server:
        with socket.socket() as full:
            # A listener with a full backlog drops what comes: connecting hangs.
            full.bind(("127.0.0.2", server.port))
            full.listen(0)
            stuck = [socket.socket() for _ in range(3)]
            for sock in stuck:
                sock.setblocking(False)
                sock.connect_ex(full.getsockname())
            resolve = resolving("127.0.0.2", "127.0.0.1")
            async with asyncio.timeout(3):
                assert await get(Origin("http", "two.example", server.port), resolve=resolve) == b"hi"
            for sock in stuck:
                sock.close()


async def test_a_name_without_addresses_says_so(get: Get) -> None:
    with pytest.raises(UpstreamUnreachable, match=r"none\.example:80 can't be reached: its name has no address\."):
        await get(Origin("http", "none.example", 80), resolve=resolving())


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        (OSError("no such name"), "the name x.example was not found"),
        (socket.gaierror(socket.EAI_NONAME, "unknown"), "the name x.example was not found"),
        (UnicodeError("label too long"), "the name x.example was not found"),
        (socket.gaierror(socket.EAI_AGAIN, "try again"), "the name x.example can't be looked up now"),
    ],
)
async def test_a_failed_look_up_names_the_host(get: Get, failure: Exception, reason: str) -> None:
    async def resolve(host: str, port: int) -> Sequence[str]:
        raise failure

    with pytest.raises(UpstreamUnreachable, match=reason):
        await get(Origin("https", "x.example", 443), resolve=resolve)


async def test_a_look_up_has_its_own_deadline(get: Get, monkeypatch: pytest.MonkeyPatch) -> None:
    async def hang(host: str, port: int) -> Sequence[str]:
        await asyncio.Event().wait()
        return ()

    monkeypatch.setattr(resolver, "LOOKUP_TIMEOUT", 0.05)
    with pytest.raises(UpstreamUnreachable, match=r"x\.example can't be looked up now"):
        await get(Origin("https", "x.example", 443), resolve=hang)


def test_families_alternate_starting_with_that_of_the_first_address() -> None:  # RFC 8305 §4
    assert dial._alternate_families(["::1", "::2", "::3", "10.0.0.1", "10.0.0.2"]) == [
        "::1",
        "10.0.0.1",
        "::2",
        "10.0.0.2",
        "::3",
    ]
    assert dial._alternate_families([]) == []


def test_a_link_local_address_keeps_its_zone() -> None:
    address = resolver._with_zone(("fe80::1", 443, 0, 2))
    assert dial._socket_address(address, 443) == ("fe80::1", 443, 0, 2)
    assert dial._socket_address(resolver._with_zone(("127.0.0.1", 443)), 443) == ("127.0.0.1", 443)


# Address policies


PUBLIC = AddressPolicy.for_upstream("https://mcp.example.com/mcp")


@pytest.mark.parametrize("addresses", [["127.0.0.1"], ["8.8.8.8", "127.0.0.1"], ["127.0.0.1", "8.8.8.8"]])
async def test_every_address_is_checked_before_any_is_dialed(addresses: list[str]) -> None:  # T1, T3
    async with RawServer(answers(ok())) as server:
        dialer = Dialer(environ={}, resolve=resolving(*addresses))
        origin = Origin("https", "as.example.com", server.port)
        with pytest.raises(AddressRefused, match=r"as\.example\.com leads to 127\.0\.0\.1, a loopback address"):
            await dialer.open(origin, lambda _: asyncio.Protocol(), timeout=5, policy=PUBLIC)
    assert server.peers == []


async def test_an_address_from_an_earlier_look_up_is_checked_again() -> None:  # T81, T3
    asked: list[str] = []

    async def resolve(host: str, port: int) -> Sequence[str]:
        asked.append(host)
        return ("127.0.0.1",)

    async with RawServer(answers(ok())) as server:
        dialer = Dialer(environ={}, resolve=resolve)
        origin = Origin("http", "as.example.com", server.port)
        allowing = AddressPolicy.for_upstream("https://mcp.example.com/mcp", ["as.example.com"])
        opened = await dialer.open(origin, lambda _: asyncio.Protocol(), timeout=5, policy=allowing)
        with pytest.raises(AddressRefused, match=r"as\.example\.com leads to 127\.0\.0\.1, a loopback address"):
            await dialer.open(origin, lambda _: asyncio.Protocol(), timeout=5, policy=PUBLIC)
        assert isinstance(opened, asyncio.Protocol)
        assert len(server.peers) == 1
    assert asked == ["as.example.com"]


async def test_a_name_whose_addresses_cannot_be_reached_is_looked_up_at_its_next_use() -> None:  # T81
    asked: list[str] = []

    async def resolve(host: str, port: int) -> Sequence[str]:
        asked.append(host)
        return ("127.0.0.3",) if len(asked) == 1 else ("127.0.0.1",)

    async with RawServer(answers(ok(), ok())) as server:
        upstream = HttpClient(Dialer(environ={}, resolve=resolve), connections_per_origin=5)
        origin = Origin("http", "moved.example", server.port)
        with pytest.raises(UpstreamUnreachable, match="connection refused"):
            await upstream.send(origin, REQUEST, method=b"GET", head_timeout=5)
        async with asyncio.timeout(5):
            await until_served(upstream, origin)
        await upstream.aclose()
    assert len(asked) == 2


async def until_served(upstream: HttpClient, origin: Origin) -> None:
    """Send requests until one is answered: on a busy machine, the last good address may be tried once more."""
    while True:
        with contextlib.suppress(UpstreamUnreachable):
            await (await upstream.send(origin, REQUEST, method=b"GET", head_timeout=5)).read()
            return


@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_documents_that_name_unanswered_hosts_leave_their_server_its_own_look_up(scheme: str) -> None:  # T81
    async def resolve(host: str, port: int) -> Sequence[str]:
        if host.startswith("hang"):
            await asyncio.Event().wait()
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    dialer = Dialer(environ={}, resolve=resolve)
    policy = AddressPolicy.for_upstream(f"{scheme}://mcp.example.com/mcp")

    def open_document(host: str) -> "asyncio.Future[asyncio.Protocol]":
        origin = Origin("https", host, 443)
        return asyncio.ensure_future(dialer.open(origin, lambda _: asyncio.Protocol(), timeout=0.1, policy=policy))

    documents = [open_document(f"hang{number}.example") for number in range(20)]
    for failed in await asyncio.gather(*documents, return_exceptions=True):
        assert "can't be looked up now" in str(failed)
    # Their look-ups are still out. The server itself gets its answer, and so does another server.
    with pytest.raises(UpstreamUnreachable, match="was not found"):
        await dialer.open(Origin(scheme, "mcp.example.com", 443), lambda _: asyncio.Protocol(), timeout=5)
    with pytest.raises(UpstreamUnreachable, match="because 4 other look-ups are unanswered"):
        await open_document("as.example.com")


@pytest.mark.parametrize("host", ["0x7f.1", "2130706433", "10.0.0.1", "fd00::1", "10.0.0.1.", "0x7f.1.", "2130706433."])
async def test_an_address_in_any_spelling_is_checked_before_a_forward_proxy_is_asked(host: str) -> None:  # T2, T87
    async with RawServer(answers(b"HTTP/1.1 407 No\r\n\r\n")) as proxy:
        # It would be let through as a name that is not found here.
        dialer = Dialer(environ={"HTTPS_PROXY": f"http://127.0.0.1:{proxy.port}"}, trust_proxy=True)
        with pytest.raises(AddressRefused, match=r"a (loopback|private) address"):
            await dialer.open(Origin("https", host, 443), lambda _: asyncio.Protocol(), timeout=5, policy=PUBLIC)
    assert proxy.peers == []


PROXIED = Origin("https", "as.example.com", 443)


async def nowhere(host: str, port: int) -> Sequence[str]:
    if host == PROXIED.host:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    return (host,)


async def test_a_name_is_checked_before_a_forward_proxy_is_asked() -> None:  # T87
    async with RawServer(answers(ok())) as proxy:
        environ = {"HTTPS_PROXY": f"http://127.0.0.1:{proxy.port}"}
        for trust_proxy in (False, True):
            dialer = Dialer(environ=environ, resolve=resolving("8.8.8.8", "10.0.0.1"), trust_proxy=trust_proxy)
            with pytest.raises(AddressRefused, match=r"as\.example\.com leads to 10\.0\.0\.1, a private address"):
                await dialer.open(PROXIED, lambda _: asyncio.Protocol(), timeout=5, policy=PUBLIC)
    assert proxy.peers == []


async def test_a_name_that_is_not_found_is_left_to_a_forward_proxy_only_if_that_is_trusted() -> None:  # T87
    async with RawServer(answers(b"HTTP/1.1 407 No\r\n\r\n")) as proxy:
        environ = {"HTTPS_PROXY": f"http://127.0.0.1:{proxy.port}"}
        with pytest.raises(UpstreamUnreachable, match=r"as\.example\.com was not found.*outbound\.trust_proxy"):
            await Dialer(environ=environ, resolve=nowhere).open(
                PROXIED, lambda _: asyncio.Protocol(), timeout=5, policy=PUBLIC
            )
        assert proxy.peers == []
        with pytest.raises(UpstreamUnreachable, match="answered 407"):
            await Dialer(environ=environ, resolve=nowhere, trust_proxy=True).open(
                PROXIED, lambda _: asyncio.Protocol(), timeout=5, policy=PUBLIC
            )


async def test_a_slow_look_up_leaves_time_for_a_trusted_forward_proxy(monkeypatch: pytest.MonkeyPatch) -> None:  # T87
    async def hang(host: str, port: int) -> Sequence[str]:
        if host == PROXIED.host:
            await asyncio.Event().wait()
        return (host,)

    monkeypatch.setattr(dial, "PROXIED_LOOKUP_TIMEOUT", 0.05)
    async with RawServer(answers(b"HTTP/1.1 407 No\r\n\r\n")) as proxy:
        environ = {"HTTPS_PROXY": f"http://127.0.0.1:{proxy.port}"}
        with pytest.raises(UpstreamUnreachable, match=r"can't be looked up now.*outbound\.trust_proxy"):
            await Dialer(environ=environ, resolve=hang).open(
                PROXIED, lambda _: asyncio.Protocol(), timeout=0.1, policy=PUBLIC
            )
        assert proxy.peers == []
        with pytest.raises(UpstreamUnreachable, match="answered 407"):
            await Dialer(environ=environ, resolve=hang, trust_proxy=True).open(
                PROXIED, lambda _: asyncio.Protocol(), timeout=5, policy=PUBLIC
            )


# Forward proxies


def tunnel(port: int, asked: list[bytes]) -> Callable[[Peer], Awaitable[None]]:
    """A proxy that leads to a port of this machine, whatever it is asked for."""

    async def script(peer: Peer) -> None:
        asked.append(await peer.head())
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        await peer.send(b"HTTP/1.1 200 Connection established\r\nVia: x\r\n\r\n")
        await peer.pipe(reader, writer)

    return script


async def test_https_goes_through_the_proxy_of_the_environment(authority: Authority, get: Get) -> None:
    asked: list[bytes] = []
    async with (
        RawServer(answers(ok()), authority.server("mcp.example.com")) as server,
        RawServer(tunnel(server.port, asked)) as proxy,
    ):
        environ = {"HTTPS_PROXY": f"http://me:p%40ss@127.0.0.1:{proxy.port}", "NO_PROXY": "other.example"}
        assert await get(Origin("https", "mcp.example.com", 443), ca=authority.bundle, environ=environ) == b"hi"
    assert asked == [
        b"CONNECT mcp.example.com:443 HTTP/1.1\r\nHost: mcp.example.com:443\r\n"
        b"Proxy-Authorization: Basic bWU6cEBzcw==\r\n\r\n"
    ]


async def test_the_certificate_is_checked_behind_a_proxy_too(authority: Authority, get: Get) -> None:
    async with (
        RawServer(answers(ok()), authority.server("other.example")) as server,
        RawServer(tunnel(server.port, [])) as proxy,
    ):
        with pytest.raises(UpstreamUnreachable, match="for another name"):
            await get(
                Origin("https", "mcp.example.com", 443),
                ca=authority.bundle,
                environ={"https_proxy": f"127.0.0.1:{proxy.port}"},
            )


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n", r"answered 407"),
        (b"HTTP/1.1 200 OK\r\n\r\nsurplus", "no proper answer to CONNECT"),
        (b"HTTP/1.1 200 OK\r\n", "no proper answer to CONNECT"),
        (b"", "no proper answer to CONNECT"),
        (b"220 smtp\r\n\r\n", "something that is not HTTP"),
        (b"HTTP/1.1 200 " + b"x" * 20_000, "no proper answer to CONNECT"),
    ],
)
async def test_a_proxy_that_does_not_connect_is_named_without_its_password(
    get: Get, answer: bytes, reason: str
) -> None:
    async def script(peer: Peer) -> None:
        await peer.head()
        await peer.send(answer)

    async with RawServer(script) as proxy:
        environ = {"HTTPS_PROXY": f"http://me:hidden@127.0.0.1:{proxy.port}"}
        place = rf"mcp\.example\.com:443 .*the proxy 127\.0\.0\.1:{proxy.port}"
        with pytest.raises(UpstreamUnreachable, match=rf"{place}.*{reason}") as caught:
            await get(Origin("https", "mcp.example.com", 443), environ=environ)
    assert "hidden" not in str(caught.value)


async def test_plain_http_and_loopback_are_reached_directly(authority: Authority, get: Get) -> None:
    environ = {"HTTPS_PROXY": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9"}
    async with RawServer(answers(ok()), authority.server("127.0.0.1")) as server:
        assert await get(Origin("https", "127.0.0.1", server.port), ca=authority.bundle, environ=environ) == b"hi"
    async with RawServer(answers(ok())) as server:
        assert await get(Origin("http", "127.0.0.1", server.port), environ=environ) == b"hi"
