"""Sockets, addresses and URLs: knows neither MCP nor OAuth."""
