"""What ``login`` says of an upstream that answers oddly."""

import pytest

from mcp_auth_proxy.cli.account import _first


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError("1 validation error\ntools\n  Field required."), "1 validation error tools Field required"),
        (ExceptionGroup("", [ExceptionGroup("", [OSError("refused")]), ValueError("later")]), "refused"),
        (TimeoutError(), "TimeoutError"),
    ],
)
def test_an_error_is_told_on_one_line(error: Exception, text: str) -> None:
    assert _first(error) == text
