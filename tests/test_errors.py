"""Texts of errors never contain query values."""

import pytest

from mcp_auth_proxy.errors import DocumentRefused, McpAuthProxyError, without_query_values


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://a.example/mcp", "https://a.example/mcp"),
        ("https://a.example/mcp?", "https://a.example/mcp?"),
        ("https://a.example/mcp?k=s3cret&n=2", "https://a.example/mcp?k=****&n=****"),
        ("https://a.example/mcp?s3cret", "https://a.example/mcp?****"),
        ("https://a.example?k=s3=cret==", "https://a.example?k=****"),
        ("https://a.example/mcp?k=s3?c/r:e;t", "https://a.example/mcp?k=****"),
        (
            "at http://[::1]:8/x?k=s3cret, and HTTPS://b.example?t=s3cret.",
            "at http://[::1]:8/x?k=****, and HTTPS://b.example?t=****.",
        ),
        ('{"resource":"https://a.example?k=s3cret","n":1}', '{"resource":"https://a.example?k=****","n":1}'),
        ("Is it good? Use a=b.", "Is it good? Use a=b."),
    ],
)
def test_values_in_the_query_of_a_url_are_masked(text: str, shown: str) -> None:
    assert without_query_values(text) == shown


def test_no_error_shows_a_query_value() -> None:
    url = "https://a.example/mcp?k=s3cret"
    errors = [McpAuthProxyError(f"It is {url}."), DocumentRefused("metadata", url, f"it is for another than {url}")]
    assert [str(error) for error in errors if "s3cret" in f"{error} {error!r}"] == []
