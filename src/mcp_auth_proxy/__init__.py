"""A reverse proxy that does OAuth on behalf of MCP clients.

The package is a house with floors; each imports only from the floors below it:

    cli                 commands: serve, demo, check, login, logout, status
    app                 composition root: one lifespan, the routes, errors turned into answers
    proxy | web | observability
                        the data plane; the pages a browser sees; logs
    broker              token() · challenged() · complete(): all that the data plane knows of OAuth
    oauth | store       one module for each OAuth step, without sockets; the encrypted database
    config              the settings and how they are read
    models | errors     frozen values and the error tree, known to every floor

``docs/architecture.md`` tells the story of one request through these floors.
"""

__version__ = "0.1.0"
