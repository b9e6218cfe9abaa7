"""What is remembered of the server's tools on 2026-07-28: which arguments are repeated in header fields."""

import logging
from typing import Any

from mcp_auth_proxy.cli.stdio_bridge.channel import Channel, read_messages
from mcp_auth_proxy.cli.stdio_bridge.messages import ClientMessage, is_answer, mapping, read_json
from mcp_auth_proxy.errors import excerpt
from mcp_auth_proxy.rpc.encoding import encode
from mcp_auth_proxy.rpc.event_parser import EventParser
from mcp_auth_proxy.rpc.mirrored_fields import Annotations, Fields, annotations_of, request_fields

logger = logging.getLogger(__name__)

MAX_PAGES = 50


class Tools:
    """The schemas of the tools, as far as requests depend on them."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._annotations: dict[str, Annotations] = {}
        """Of the tools that have any."""

    def fields(self, message: ClientMessage) -> Fields:
        """Return the header fields of a request of 2026-07-28."""
        params = message.params or {}
        annotations = self._annotations.get(str(params.get("name"))) if message.method == "tools/call" else None
        return request_fields(message.method, params, message.version, annotations)

    def note(self, answer: dict[str, Any]) -> bool:
        """Learn from the answer to ``tools/list``; remove tools that clients must not use. Return whether it has any.

        MCP 2026-07-28, Streamable HTTP, "Schema Extension": a client of this transport leaves a tool out whose
        ``x-mcp-header`` breaks a rule. To the client behind the bridge the transport is another one.
        """
        result = answer.get("result")
        if not isinstance(result, dict) or not isinstance(tools := result.get("tools"), list):
            return False
        usable = [tool for tool in tools if self._note_tool(mapping(tool))]
        result["tools"] = usable
        return len(usable) < len(tools)

    async def refresh(self, message: ClientMessage) -> None:
        """List the tools, for a call that the server refused because of its fields. Raises McpAuthProxyError."""
        meta = {**mapping((message.params or {}).get("_meta"))}
        meta.pop("progressToken", None)
        cursor: object = None
        for _ in range(MAX_PAGES):
            params: dict[str, object] = {"_meta": meta, **({} if cursor is None else {"cursor": cursor})}
            request = {"jsonrpc": "2.0", "id": "mcp-auth-proxy", "method": "tools/list", "params": params}
            fields = request_fields("tools/list", params, message.version)
            response = await self._channel.send(b"POST", fields, encode(request), harmless=True)
            cursor = None
            try:
                async for data in read_messages(response, EventParser()):
                    answer = read_json(data)
                    if is_answer(answer):
                        self.note(answer)
                        cursor = mapping(answer.get("result")).get("nextCursor")
                        break
            except ValueError:
                return
            finally:
                response.close()
            if not isinstance(cursor, str):
                return

    def _note_tool(self, tool: Any) -> bool:
        name = str(tool.get("name"))
        self._annotations.pop(name, None)
        try:
            annotations = annotations_of(tool.get("inputSchema"))
        except ValueError as error:
            logger.warning("the tool %s is left out: %s", excerpt(name), error)
            return False
        if annotations:
            self._annotations[name] = annotations
        return True
