"""Which hosts belong to one site."""  # T77

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcp_auth_proxy.net.sites import same_site

SAME = [
    ("as.example.com", "as.example.com"),
    ("as.example.com", "login.example.com"),
    ("example.com", "a.b.c.example.com"),
    ("AS.Example.com", "as.example.COM"),
    ("as.example.com.", "login.example.com"),
    ("a.example.co.uk", "example.co.uk"),
    ("a.user.github.io", "user.github.io"),
    ("a.city.kawasaki.jp", "b.city.kawasaki.jp"),
    ("a.xn--85x722f.xn--55qx5d.cn", "xn--85x722f.xn--55qx5d.cn"),
    ("a.example.unlisted", "b.example.unlisted"),
    ("github.io", "github.io"),
    ("localhost", "localhost"),
    ("localhost", "localhost."),
    ("a.b.localhost", "b.localhost"),
    ("keycloak", "keycloak"),
    ("127.0.0.1", "127.0.0.1"),
    ("::1", "0:0:0:0:0:0:0:1"),
    ("2001:DB8::1", "2001:db8::1"),
]
OTHER = [
    ("example.com", "example.org"),
    ("example.com", "example.com.evil.example"),
    ("example.com", "notexample.com"),
    ("a.co.uk", "b.co.uk"),
    ("co.uk", "a.co.uk"),
    ("alice.github.io", "bob.github.io"),
    ("github.io", "bob.github.io"),
    ("a.workers.dev", "b.workers.dev"),
    ("a.s3.amazonaws.com", "b.s3.amazonaws.com"),
    ("cognito-idp.us-east-1.amazonaws.com", "pool.auth.us-east-1.amazoncognito.com"),
    ("a.other.kawasaki.jp", "b.other2.kawasaki.jp"),
    ("a.xn--55qx5d.cn", "b.xn--55qx5d.cn"),
    ("keycloak", "mcp"),
    ("localhost", "127.0.0.1"),
    ("localhost", "::1"),
    ("a.localhost", "b.localhost"),
    ("localhost", "a.localhost"),
    ("127.0.0.1", "127.0.0.2"),
    ("10.1.2.3", "11.1.2.3"),
    ("1.2.3.4", "9.9.3.4"),
    ("127.0.0.1", "127.1"),
    ("127.0.0.1", "0x7f.1"),
    ("9.0x7f.1", "8.0x7f.1"),
    ("a.b.0x1", "c.b.0x1"),
    ("127.0.0.1", "::ffff:127.0.0.1"),
    ("::1", "::2"),
    ("1.2.3.4", "a.1.2.3.4"),
]


@pytest.mark.parametrize(("host", "other"), SAME)
def test_hosts_of_one_registrable_domain_are_one_site(host: str, other: str) -> None:
    assert same_site(host, other)
    assert same_site(other, host)


@pytest.mark.parametrize(("host", "other"), OTHER)
def test_other_hosts_are_other_sites(host: str, other: str) -> None:
    assert not same_site(host, other)
    assert not same_site(other, host)


@given(st.from_regex(r"\A[a-z0-9_-]{1,5}(\.[a-z0-9_-]{1,5}){0,5}\.?\Z"), st.sampled_from(["example.com", "co.uk", "1"]))
def test_any_host_has_a_site(host: str, other: str) -> None:
    assert same_site(host, host)
    assert same_site(host, other) == same_site(other, host)


def test_the_list_is_loaded_only_if_hosts_differ_and_needs_no_network() -> None:
    program = """
import socket
from mcp_auth_proxy.net import sites
def refuse(*arguments, **options):
    raise AssertionError("network")
socket.socket = socket.getaddrinfo = refuse
assert sites.same_site("a.example.com", "a.example.com") and not sites.same_site("127.0.0.1", "127.0.0.2")
assert not sites._public_suffixes.cache_info().currsize
assert sites.same_site("a.example.com", "b.example.com")
assert sites._public_suffixes.cache_info().currsize
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=30)
