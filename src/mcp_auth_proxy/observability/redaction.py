"""Mask credentials in text: the second line of defense of every log line.

The proxy itself logs no secret, but libraries put URLs and header fields into their messages.
"""

import re

_MASK = "****"

_START = r"(?:(?<![\w-])|(?<=%[0-9a-f]{2}))"
"""Where a name begins: at a word boundary, or after a percent-encoded separator (a URL inside a parameter)."""

_SECRETS = r"[\w-]*secret|[\w-]*password|[\w-]*api[_-]key|code_verifier|device_code"

_PARAMETERS = re.compile(
    rf"""{_START}({_SECRETS}|[\w-]*token(?:_hint)?|[\w-]*assertion|(?:\w+_)?code|state
                  |(?:proxy-)?authorization|(?:set-)?cookie|dpop)
    (\\*["']\s{{0,40}}[:,=]\s{{0,40}}b?(?=\\*["'])   # the name in quotes, and so the value: JSON, repr
     |\s{{0,3}}(?:=|%3d)\s{{0,3}}b?)                 # a query, a form, an assignment
    (?:(\\{{0,15}}["'])(?:\\.|.)*?(?=\3|\Z)       # 15: a quote in JSON in JSON in JSON in JSON
     | (?:\\{{16}}).* | [^\s&"',;)\]}}]+)""",
    re.IGNORECASE | re.VERBOSE | re.DOTALL,
)
_LINES = re.compile(rf"{_START}((?:proxy-)?authorization|(?:set-)?cookie)(\s{{0,3}}:\s{{0,3}})[^\r\n]+", re.IGNORECASE)
_FIELDS = re.compile(
    rf"{_START}({_SECRETS}|[\w-]+_token|[\w-]+_assertion|dpop)(\s{{0,3}}:\s{{0,3}})[^\s&\"',;)\]}}]+", re.IGNORECASE
)
_CREDENTIALS = re.compile(
    r"\b((?:(?:Bearer|Basic|DPoP)\s{1,8}){1,3})"
    r"(?!(?:tokens?|authentication|authorization|challenge|credentials?|header|scheme)(?![\w.~+/-])|[a-z_]+=[\"\w])"
    r"[\w.~+/-]{6,}=*",
    re.IGNORECASE,
)
_USERINFO = re.compile(r"(://[^\s/?#@:]*:)[^\s/?#@]+(?=@)")
_JWT = re.compile(r"(?<![\w-])eyJ[\w-]{5,}(?:\.[\w-]*){2,4}")


def redact(text: str) -> str:
    """Mask what looks like a credential: parameters, header fields, passwords in URLs, JWTs.

    Words such as "code" and "state" are masked only as names of parameters, so that prose stays readable.
    """
    text = _PARAMETERS.sub(rf"\1\2\3{_MASK}", text)
    text = _LINES.sub(rf"\1\2{_MASK}", text)
    text = _FIELDS.sub(rf"\1\2{_MASK}", text)
    text = _CREDENTIALS.sub(rf"\1{_MASK}", text)
    text = _USERINFO.sub(rf"\1{_MASK}", text)
    return _JWT.sub(_MASK, text)
