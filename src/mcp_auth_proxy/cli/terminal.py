"""All that the commands print. Control characters in it are escaped: names, tools and errors come from servers."""

import json

import click

from mcp_auth_proxy.observability.controls import escaped, escaped_json


class Styled(str):
    """A line with colors, made of our own words only. It is printed as it is."""


def say(*lines: str, err: bool = False) -> None:
    """Print each text on a line of its own, on stdout or stderr. Colors are removed if that is not a terminal."""
    for line in lines:
        click.echo(line if isinstance(line, Styled) else escaped(line), err=err)


def say_json(document: object) -> None:
    """Print a document as JSON."""
    say(*escaped_json(json.dumps(document, indent=2, ensure_ascii=False)).split("\n"))


def complain(*lines: str) -> None:
    """Print each text on a line of its own, on stderr."""
    say(*lines, err=True)
