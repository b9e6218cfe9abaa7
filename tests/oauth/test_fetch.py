"""The guarded HTTP client, against real sockets."""

import asyncio
import datetime
import gzip
import ipaddress
import logging
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from mcp_auth_proxy.errors import AuthorizationServerUnavailable, DocumentRefused
from mcp_auth_proxy.net import resolver, urls
from mcp_auth_proxy.net import tls as net_tls
from mcp_auth_proxy.net.dial import Dialer
from mcp_auth_proxy.net.http_client import HttpClient
from mcp_auth_proxy.net.resolver import Resolve
from mcp_auth_proxy.net.tls import client_context
from mcp_auth_proxy.oauth.fetch import MAX_BODY, AddressPolicy, Fetcher, Response, paced

LOCAL = AddressPolicy.for_upstream("http://127.0.0.1:1/mcp")
PUBLIC = AddressPolicy.for_upstream("https://mcp.example.com/mcp")

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@dataclass
class Server:
    """A server that keeps what it received and answers with fixed bytes, or as ``handler`` says."""

    answer: bytes = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"
    handler: Handler | None = None
    port: int = 0
    connections: int = 0
    requests: list[bytes] = field(default_factory=list)
    tasks: set[asyncio.Task[None]] = field(default_factory=set)

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        task = asyncio.current_task()
        assert task is not None
        self.tasks.add(task)
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            _, _, length = head.lower().partition(b"content-length: ")
            body = await reader.readexactly(int(length.split(b"\r\n")[0])) if length else b""
            self.requests.append(head + body)
            if self.handler is not None:
                await self.handler(reader, writer)
            else:
                writer.write(self.answer)
                await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            if self.handler is not None:
                writer.transport.abort()
            else:
                writer.close()

    def url(self, path: str = "/doc") -> str:
        return f"http://127.0.0.1:{self.port}{path}"


@asynccontextmanager
async def running(server: Server, tls: ssl.SSLContext | None = None) -> AsyncIterator[Server]:
    listener = await asyncio.start_server(server, "127.0.0.1", 0, ssl=tls)
    server.port = listener.sockets[0].getsockname()[1]
    async with listener:
        try:
            yield server
        finally:
            for task in server.tasks:
                task.cancel()
            await asyncio.gather(*server.tasks, return_exceptions=True)


def answering(*addresses: str) -> Callable[[str, int], Awaitable[Sequence[str]]]:
    async def resolve(host: str, port: int) -> Sequence[str]:
        return addresses

    return resolve


async def fetch(url: str, policy: AddressPolicy = LOCAL, fetcher: Fetcher | None = None) -> Response:
    return await (fetcher or Fetcher()).get(url, document="metadata", policy=policy)


async def test_a_document_is_read_with_plain_headers() -> None:
    answer = b"HTTP/1.1 201 OK\r\nX-A: 1\r\nX-A: 2\r\nSet-Cookie: a=b\r\nContent-Length: 2\r\n\r\n{}"
    async with running(Server(answer)) as server:
        response = await fetch(server.url("/a/b?c=%20d"))
        await fetch(server.url())

    assert (response.status, response.body, response.headers["x-a"]) == (201, b"{}", "1, 2")
    head, _, _ = server.requests[0].partition(b"\r\n\r\n")
    lines = head.split(b"\r\n")
    assert lines[0] == b"GET /a/b?c=%20d HTTP/1.1"
    assert f"Host: 127.0.0.1:{server.port}".encode() in lines
    assert b"Accept: application/json" in lines
    assert b"Accept-Encoding: identity" in lines
    assert b"cookie" not in server.requests[1].lower()  # T34


async def test_a_form_is_posted_as_it_is() -> None:
    async with running(Server()) as server:
        await Fetcher().post(
            server.url("/token"),
            body=b"a=b",
            content_type="application/x-www-form-urlencoded",
            headers=[("Authorization", "Basic eA==")],
            document="token response",
            policy=LOCAL,
        )

    assert server.requests[0].startswith(b"POST /token HTTP/1.1\r\n")
    assert b"Authorization: Basic eA==\r\n" in server.requests[0]
    assert b"Content-Length: 3\r\n" in server.requests[0]
    assert server.requests[0].endswith(b"\r\n\r\na=b")


async def post(url: str) -> Response:
    return await Fetcher().post(url, body=b"a=b", content_type="text/plain", document="token response", policy=LOCAL)


async def test_only_what_is_posted_to_the_url_of_a_pace_waits_for_it() -> None:
    seen: list[int] = []

    async def wait() -> None:
        seen.append(len(server.requests))

    async with running(Server()) as server:
        with paced(server.url("/token"), wait):
            await fetch(server.url("/token"))
            await post(server.url("/other"))
            await post(server.url("/token"))
        await post(server.url("/token"))

    assert (seen, len(server.requests)) == ([2], 4)


async def test_nothing_is_sent_on_a_connection_that_was_closed_meanwhile() -> None:
    arrived, closed = asyncio.Event(), asyncio.Event()

    async def close(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await arrived.wait()
        writer.close()
        await writer.wait_closed()
        closed.set()

    async def wait() -> None:
        arrived.set()
        await closed.wait()
        await asyncio.sleep(0.05)

    listener = await asyncio.start_server(close, "127.0.0.1", 0)
    async with listener:
        url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}/token"
        with (
            paced(url, wait),
            pytest.raises(AuthorizationServerUnavailable, match="before anything") as failed,
        ):
            await post(url)
    assert not failed.value.maybe_processed


@pytest.mark.parametrize(
    "url",
    [
        "http://169.254.169.254/latest/meta-data/",
        "https://169.254.169.254/",
        "https://10.0.0.1/",
        "https://100.64.0.1/",
        "https://192.0.0.192/",
        "https://[64:ff9b::a9fe:a9fe]/",
        "https://0x7f.1/",
        "https://2130706433/",
        "https://①②⑦.⓪.⓪.①/",
        "https://localhost/",
        "http://localhost/",
    ],
)
async def test_a_public_upstream_leads_to_no_private_address(url: str) -> None:  # T1, T2
    with pytest.raises(DocumentRefused):
        await fetch(url, PUBLIC)


@pytest.mark.parametrize("address", ["169.254.169.254", "10.0.0.1", "fd00::1", "64:ff9b::7f00:1"])
async def test_an_upstream_on_loopback_leads_to_no_private_address(address: str) -> None:  # T1
    fetcher = Fetcher(Dialer(resolve=answering("127.0.0.1", address)))

    with pytest.raises(DocumentRefused) as refused:
        await fetch("https://as.example.com/x", LOCAL, fetcher)

    assert address in str(refused.value)


async def test_a_refused_address_is_named_with_its_class_and_the_key() -> None:  # T1
    with pytest.raises(DocumentRefused) as refused:
        await fetch("https://as.example.com/x", PUBLIC, Fetcher(Dialer(resolve=answering("169.254.169.254"))))

    text = str(refused.value)
    for part in (
        "metadata",
        "https://as.example.com/x",
        "169.254.169.254",
        "link-local",
        "authorization.allow_private",
    ):
        assert part in text


async def test_no_packet_is_sent_to_a_refused_address() -> None:  # T1
    async with running(Server()) as server:
        with pytest.raises(DocumentRefused):
            await fetch(
                f"https://as.example.com:{server.port}/x", PUBLIC, Fetcher(Dialer(resolve=answering("127.0.0.1")))
            )
        with pytest.raises(DocumentRefused, match=r"authorization\.allow_private"):
            await fetch(server.url(), PUBLIC)

    assert server.connections == 0


def rebinding(asked: list[str]) -> Resolve:
    """A resolver whose answer is allowed the first time only."""

    async def resolve(host: str, port: int) -> Sequence[str]:
        asked.append(host)
        return ["127.0.0.1"] if len(asked) == 1 else ["169.254.169.254"]

    return resolve


async def test_the_checked_address_is_dialed_whatever_the_name_leads_to_meanwhile() -> None:  # T3
    asked: list[str] = []
    async with running(Server()) as server:
        fetcher = Fetcher(Dialer(resolve=rebinding(asked)))
        for _ in range(3):
            assert (await fetch(f"http://localhost:{server.port}/x", LOCAL, fetcher)).status == 200

    assert (len(asked), server.connections) == (1, 3)


async def test_the_addresses_of_each_look_up_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:  # T3
    monkeypatch.setattr(resolver, "FRESH", -1.0)
    monkeypatch.setattr(resolver, "PATIENCE", 5.0)
    asked: list[str] = []
    async with running(Server()) as server:
        fetcher = Fetcher(Dialer(resolve=rebinding(asked)))
        assert (await fetch(f"http://localhost:{server.port}/x", LOCAL, fetcher)).status == 200
        with pytest.raises(DocumentRefused, match="link-local"):
            await fetch(f"http://localhost:{server.port}/x", LOCAL, fetcher)

    assert (len(asked), server.connections) == (2, 1)


async def test_the_next_address_is_tried_if_one_refuses() -> None:
    async with running(Server()) as server:
        fetcher = Fetcher(Dialer(resolve=answering("127.0.0.2", "127.0.0.1")))
        assert (await fetch(f"http://localhost:{server.port}/x", LOCAL, fetcher)).status == 200


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_no_redirect_is_followed(status: int) -> None:  # T4
    async with running(Server()) as target:
        answer = f"HTTP/1.1 {status} Moved\r\nLocation: {target.url()}\r\nContent-Length: 0\r\n\r\n"
        async with running(Server(answer.encode())) as server:
            with pytest.raises(DocumentRefused, match="redirects are not followed"):
                await fetch(server.url())

    assert (len(server.requests), target.connections) == (1, 0)


async def test_a_compressed_document_is_refused() -> None:  # T24
    bomb = gzip.compress(b"0" * 10_000_000)
    head = f"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: {len(bomb)}\r\n\r\n"
    async with running(Server(head.encode() + bomb)) as server:
        with pytest.raises(DocumentRefused, match="compressed"):
            await fetch(server.url())


@pytest.mark.parametrize("framing", [b"Content-Length: 100000000\r\n", b""])
async def test_an_endless_document_is_refused(framing: bytes) -> None:  # T24
    async def endless(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n" + framing + b"\r\n")
        while True:
            writer.write(b" " * 65536)
            await writer.drain()

    async with running(Server(handler=endless)) as server:
        with pytest.raises(DocumentRefused, match="longer than 256 KiB"):
            await fetch(server.url())


async def test_a_document_of_exactly_the_limit_is_read() -> None:
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % MAX_BODY + b" " * MAX_BODY
    async with running(Server(answer)) as server:
        assert len((await fetch(server.url())).body) == MAX_BODY


@pytest.mark.parametrize(
    ("framing", "body"),
    [
        (b"Content-Length: 2\r\n\r\n", b"{}"),
        (b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n{\r\n1;x=y\r\n}\r\n0\r\nTrailer: a\r\n\r\n"),
        (b"\r\n", b"{}"),
        (b"Connection: keep-alive\r\nContent-Length: 2\r\n\r\n", b"{}"),
    ],
    ids=["length", "chunked", "until the end", "kept alive"],
)
async def test_a_body_is_read_however_it_is_framed(framing: bytes, body: bytes) -> None:
    async with running(Server(b"HTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.1 200 OK\r\n" + framing + body)) as server:
        assert (await fetch(server.url())).body == b"{}"


async def test_each_request_has_its_own_connection() -> None:
    async def keep_open(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
        async with asyncio.timeout(5):
            ended.append(await reader.read())

    ended: list[bytes] = []
    fetcher = Fetcher()
    async with running(Server(handler=keep_open)) as server:
        for _ in range(2):
            assert (await fetch(server.url(), fetcher=fetcher)).body == b"{}"
        async with asyncio.timeout(5):
            while len(ended) < 2:  # noqa: ASYNC110
                await asyncio.sleep(0.001)

    assert server.connections == 2
    assert ended == [b"", b""]
    assert b"\r\nConnection: close\r\n" in server.requests[0]


@pytest.mark.parametrize(
    ("head", "reason"),
    [(b"X: " + b"x" * 70_000, "its head is over 65536 bytes"), (b"X: x\r\n" * 201, "its head has over 200 fields")],
)
async def test_a_head_beyond_its_limits_is_unavailable(head: bytes, reason: str) -> None:
    async with running(Server(b"HTTP/1.1 200 OK\r\n" + head + b"\r\n\r\n")) as server:
        with pytest.raises(AuthorizationServerUnavailable, match=f"Could not fetch the metadata from .*{reason}"):
            await fetch(server.url())


@pytest.mark.parametrize("value", ["a\r\nX: y", "a\nb", "a\0", "é", " a"])
async def test_no_header_can_be_smuggled_into_a_request(value: str) -> None:
    async with running(Server()) as server:
        with pytest.raises(ValueError, match="Authorization"):
            await Fetcher().post(
                server.url(),
                body=b"",
                content_type="x/y",
                headers=[("Authorization", value)],
                document="token response",
                policy=LOCAL,
            )
    assert server.connections == 0


@pytest.mark.parametrize("start", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n"])
async def test_a_dripping_document_meets_the_total_deadline(start: bytes) -> None:  # T24
    async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(start)
        while True:
            writer.write(b"H")
            await writer.drain()
            await asyncio.sleep(0.02)

    async with running(Server(handler=drip)) as server:
        async with asyncio.timeout(5):
            with pytest.raises(AuthorizationServerUnavailable) as failed:
                await fetch(server.url(), fetcher=Fetcher(deadline=0.3))
    # An answer that never was HTTP may fail sooner, as that.
    assert "0.3 s" in str(failed.value) or "not valid HTTP" in str(failed.value)


async def test_a_resolver_that_hangs_meets_the_total_deadline() -> None:
    async def hang(host: str, port: int) -> Sequence[str]:
        await asyncio.Event().wait()
        return ()

    with pytest.raises(AuthorizationServerUnavailable):
        await fetch("https://as.example.com/", fetcher=Fetcher(Dialer(resolve=hang), deadline=0.1))


@pytest.mark.parametrize("answer", [b"", b"SSH-2.0-OpenSSH\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n{}"])
async def test_an_invalid_or_truncated_response_is_unavailable(answer: bytes) -> None:
    async with running(Server(answer)) as server:
        with pytest.raises(AuthorizationServerUnavailable, match=str(server.port)):
            await fetch(server.url())


async def test_a_closed_port_and_an_unknown_name_are_unavailable() -> None:
    async def unknown(host: str, port: int) -> Sequence[str]:
        raise OSError("no such name")

    async with running(Server()) as server:
        pass
    with pytest.raises(AuthorizationServerUnavailable):
        await fetch(server.url())
    with pytest.raises(AuthorizationServerUnavailable, match=r"the name as\.example\.com was not found"):
        await fetch("https://as.example.com/", fetcher=Fetcher(Dialer(resolve=unknown)))


async def test_a_post_is_sent_once_and_says_whether_it_may_have_been_processed() -> None:
    async def post(url: str) -> AuthorizationServerUnavailable:
        with pytest.raises(AuthorizationServerUnavailable) as failed:
            await Fetcher().post(url, body=b"a=b", content_type="x/y", document="token response", policy=LOCAL)
        return failed.value

    async with running(Server(b"")) as server:
        assert (await post(server.url())).maybe_processed
    assert len(server.requests) == 1
    assert not (await post(server.url())).maybe_processed


async def test_an_upstream_configured_as_http_is_asked_but_never_posted_to() -> None:
    async with running(Server()) as server:
        url = f"http://mcp:{server.port}/x"
        policy = AddressPolicy.for_upstream(url)
        fetcher = Fetcher(Dialer(resolve=answering("127.0.0.1")))

        assert (await fetch(url, policy, fetcher)).status == 200
        with pytest.raises(DocumentRefused, match="must be https"):
            await fetcher.post(url, body=b"", content_type="x/y", document="token response", policy=policy)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A self-signed certificate for as.test and 127.0.0.1, with its key, in one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "as.test")])
    names = [x509.DNSName("as.test"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    now = datetime.datetime.now(datetime.UTC)
    built = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path_factory.mktemp("tls") / "cert.pem"
    path.write_bytes(
        built.public_bytes(serialization.Encoding.PEM)
        + key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return path


@pytest.fixture
def tls(certificate: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    return context


async def test_a_private_authority_is_trusted_through_ca_bundle(certificate: Path, tls: ssl.SSLContext) -> None:
    fetcher = Fetcher(Dialer(ca_bundle=certificate, resolve=answering("127.0.0.1")))
    async with running(Server(), tls) as server:
        assert (await fetch(f"https://as.test:{server.port}/x", fetcher=fetcher)).status == 200
        with pytest.raises(AuthorizationServerUnavailable, match="its certificate is for another name"):
            await fetch(f"https://other.test:{server.port}/x", fetcher=fetcher)


async def test_a_private_authority_is_trusted_through_ssl_cert_file(
    certificate: Path, tls: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    async with running(Server(), tls) as server:
        assert (await fetch(f"https://127.0.0.1:{server.port}/x")).status == 200


async def test_an_unknown_authority_is_unavailable_and_the_key_is_named(tls: ssl.SSLContext) -> None:
    async with running(Server(), tls) as server:
        with pytest.raises(AuthorizationServerUnavailable, match=r"outbound\.ca_bundle"):
            await fetch(f"https://127.0.0.1:{server.port}/x")

    assert server.requests == []


async def test_https_goes_through_the_proxy_of_the_environment(certificate: Path, tls: ssl.SSLContext) -> None:
    async def resolve(host: str, port: int) -> Sequence[str]:
        return ("8.8.8.8" if host == "as.test" else "127.0.0.1",)

    async with running(Server(), tls) as target:

        async def tunnel(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", target.port)
            writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
            await asyncio.gather(_pump(reader, far_writer), _pump(far_reader, writer))

        async with running(Server(handler=tunnel)) as proxy:
            environ = {"HTTPS_PROXY": f"http://me:pass@127.0.0.1:{proxy.port}", "NO_PROXY": "direct.test"}
            fetcher = Fetcher(Dialer(ca_bundle=certificate, resolve=resolve, environ=environ))

            response = await fetch("https://as.test/x", PUBLIC, fetcher)
            with pytest.raises(DocumentRefused, match="link-local"):
                await fetch("https://169.254.169.254/x", PUBLIC, fetcher)
            with pytest.raises(DocumentRefused, match="loopback"):
                await fetch("https://0x7f.1/x", PUBLIC, fetcher)
            with pytest.raises(DocumentRefused, match="loopback"):
                await fetch("https://a.direct.test/x", PUBLIC, fetcher)

    assert response.status == 200
    assert len(proxy.requests) == 1
    assert proxy.requests[0].startswith(b"CONNECT as.test:443 ")
    assert b"Proxy-Authorization: Basic bWU6cGFzcw==" in proxy.requests[0]
    assert b"proxy-authorization" not in target.requests[0].lower()


async def test_hosts_in_no_proxy_are_fetched_directly(certificate: Path, tls: ssl.SSLContext) -> None:
    async with running(Server(), tls) as target:
        for no_proxy in ("*.test", f"as.test:{target.port}", "a.example,as.test"):
            environ = {"HTTPS_PROXY": "http://127.0.0.1:9", "NO_PROXY": no_proxy}
            dialer = Dialer(ca_bundle=certificate, resolve=answering("127.0.0.1"), environ=environ)
            assert (await fetch(f"https://as.test:{target.port}/x", LOCAL, Fetcher(dialer))).status == 200
        with pytest.raises(AuthorizationServerUnavailable, match=r"the proxy 127\.0\.0\.1:9 .*connection refused"):
            await fetch(f"https://other.example:{target.port}/x", LOCAL, Fetcher(dialer))


async def test_one_trust_store_serves_upstreams_and_documents_and_is_loaded_when_needed(
    certificate: Path, tls: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    def counted(ca_bundle: Path | None) -> ssl.SSLContext:
        contexts.append(client_context(ca_bundle))
        return contexts[-1]

    contexts: list[ssl.SSLContext] = []
    monkeypatch.setattr(net_tls, "client_context", counted)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    dialer = Dialer()
    fetcher, upstream = Fetcher(dialer), HttpClient(dialer, connections_per_origin=1)
    async with running(Server()) as plain, running(Server(), tls) as server:
        await fetch(plain.url(), fetcher=fetcher)
        assert contexts == []
        url = f"https://127.0.0.1:{server.port}/x"
        assert (await fetch(url, fetcher=fetcher)).status == 200
        request = b"GET / HTTP/1.1\r\nhost: h\r\n\r\n"
        response = await upstream.send(urls.parse(url).origin, request, method=b"GET", head_timeout=5)
        assert response.status == 200
        await upstream.aclose()
    assert len(contexts) == 1


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    finally:
        writer.close()


async def test_no_secret_is_logged_or_shown(caplog: pytest.LogCaptureFixture) -> None:  # T45
    answer = b"HTTP/1.1 200 OK\r\nX-Secret: canary-1\r\nContent-Length: 8\r\n\r\ncanary-2"
    with caplog.at_level(logging.DEBUG):
        async with running(Server(answer)) as server:
            response = await Fetcher().post(
                server.url("/?code=canary-3"),
                body=b"canary-4",
                content_type="x/y",
                headers=[("Authorization", "canary-5")],
                document="token response",
                policy=LOCAL,
            )

    assert "canary" not in caplog.text
    assert "canary" not in repr(response).replace(response.url, "")
