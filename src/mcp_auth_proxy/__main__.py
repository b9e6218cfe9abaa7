"""``python -m mcp_auth_proxy``: the same as the command ``mcp-auth-proxy``."""

from mcp_auth_proxy.cli.main import main

if __name__ == "__main__":
    main()
