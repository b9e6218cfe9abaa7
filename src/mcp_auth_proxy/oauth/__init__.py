"""The client side of OAuth. Each step is a pair of pure functions: build the request, read the response.

In the order of an authorization:

    challenge             WWW-Authenticate → what the resource server wants (RFC 9110 §11.6.1, RFC 6750 §3)
    discovery             where to find metadata, and validators for it (RFC 9728, RFC 8414)
    registration          becoming a client (RFC 7591, Client ID Metadata Documents)
    scopes                which scopes to request (MCP, scope selection strategy)
    authorization_code    the authorization request and response (RFC 6749 §4.1, RFC 7636, RFC 9207)
    device_authorization  the same on another device (RFC 8628)
    client_auth           client authentication at the token endpoint (RFC 6749 §2.3)
    client_assertion      private_key_jwt (RFC 7523 §2.2)
    dpop                  tokens bound to a key, and the proofs sent with them (RFC 9449)
    token_endpoint        code, refresh token or client credentials → tokens (RFC 6749 §4–6)
    jwt_bearer            an assertion → tokens (RFC 7523 §2.1)
    token_exchange        a token → another token (RFC 8693)
    revocation            revoking tokens (RFC 7009)

They use ``documents`` (strict JSON), ``oauth_error`` (errors as text for people) and ``quirks`` (known deviations of
providers). Only ``fetch``, the guarded HTTP client, opens sockets.
"""
