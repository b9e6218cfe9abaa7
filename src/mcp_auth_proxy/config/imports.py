"""Read ``store.import`` and its passphrase: exports that are taken in at the first start."""

import os
from pathlib import Path

from mcp_auth_proxy.config.reader import Section
from mcp_auth_proxy.config.settings import ImportSettings, Secret

MIN_PASSPHRASE = 12
"""Characters of a passphrase."""


def passphrase_problem(text: str) -> str | None:
    """Return why a text is no passphrase, as words that continue "the passphrase …"; None if it is one."""
    if len(text) >= MIN_PASSPHRASE:
        return None
    what = "is too short" if text else "is empty"
    return f"{what}: it needs at least {MIN_PASSPHRASE} characters; make one with: openssl rand -base64 24"


def read_imports(section: Section, *, secrets: bool) -> ImportSettings:
    """Return what the keys ``import`` and ``import_passphrase`` of the section ``store`` say."""
    context = section.context if secrets else section.context.without_secrets()

    def file(text: str) -> Path:
        kind, _, name = text.partition(":")
        if kind != "file" or not name:
            raise ValueError("must be file:PATH, a file that `mcp-auth-proxy export` has written")
        path = context.path(name)
        if secrets:
            # Not read before it is needed; but a wrong path is noticed as for every other file.
            try:
                os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC))
            except OSError as error:
                raise ValueError(f"the file {path} can't be read ({error.strerror})") from None
        return path

    def passphrase(text: str) -> Secret | None:
        kind, _, name = text.partition(":")
        if kind not in ("env", "file") or not name:
            raise ValueError("must be env:NAME or file:PATH: a passphrase does not belong in the configuration")
        if not secrets:
            return None
        found = context.secret(text)
        if problem := passphrase_problem(found.value):
            raise ValueError(problem)
        return found

    files = section.each("import", file) or ()
    given = section.parsed("import_passphrase", passphrase, None)
    if files and not section.has("import_passphrase"):
        section.error("import_passphrase", "is missing: store.import needs the passphrase of the export")
    return ImportSettings(files=files, passphrase=given)
