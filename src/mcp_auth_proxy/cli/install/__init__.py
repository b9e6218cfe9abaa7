"""``install``: enter servers of the proxy into the configuration files of MCP clients, and take them out again.

``clients`` knows where each client has its file and what an entry looks like, ``jsonc`` and ``toml_text`` edit files as
text, ``undo`` finds the text as it was before, ``files`` reads and writes, ``command`` is the command.
"""

CLIENT_NAMES = ("claude-code", "claude-desktop", "cursor", "vscode", "codex", "gemini")
"""The clients that ``install`` knows."""
