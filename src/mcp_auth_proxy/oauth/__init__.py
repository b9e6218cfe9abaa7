"""OAuth as a client speaks it: each step is a pair of pure functions, build the request and read the response.

In the order of an authorization:

    challenge             WWW-Authenticate → what the resource server asks for (RFC 9110 §11.6.1, RFC 6750 §3)
    discovery             which URLs to ask; validators of resource and server metadata (RFC 9728, RFC 8414)
    registration          becoming a client (RFC 7591, Client ID Metadata Documents)
    scopes                what to ask for (MCP, scope selection strategy)
    authorization_code    the link to the authorization server, and what comes back (RFC 6749 §4.1, 7636, 9207)
    client_auth           how the client proves itself at the token endpoint (RFC 6749 §2.3)
    dpop                  tokens bound to a key of ours, and the proofs that go with them (RFC 9449)
    token_endpoint        code, refresh token or client credentials → tokens (RFC 6749 §4–6)
    revocation            giving tokens back (RFC 7009)

Beneath them ``urls`` (which URLs are acceptable), ``addresses`` (which addresses may be dialled), ``documents``
(strict JSON) and ``oauth_error`` (an error as text for people). No sockets but in ``fetch``, the one HTTP client.
"""
