"""A reverse proxy that does OAuth on behalf of MCP clients.

Each layer imports only from those below it; layers on one line do not import each other::

    cli                 commands
    app                 composition root: builds every layer and closes it again
    router              where each request goes
    proxy | web         forwarding of MCP; pages and health endpoints
    identity            who calls
    broker              which token a request may use, and what happens if there is none
    oauth | store | servers
                        one module for each OAuth step, without sockets; the encrypted database; the server map
    config              the settings and how they are read
    net                 sockets, HTTP/1.1 and URLs
    rpc | observability | models | errors
                        JSON-RPC; logs and metrics; frozen values; the error tree
    secret_values       what to mask in texts from outside

``docs/architecture.md`` follows a call, a challenge, a refresh and a reload through them.
"""

__version__ = "0.1.0"
