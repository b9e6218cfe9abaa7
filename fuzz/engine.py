"""``python -m fuzz.engine TARGET OPTION…``: one target under libFuzzer, whose options follow. Needs atheris."""

import sys

import atheris

with atheris.instrument_imports(include=["mcp_auth_proxy"], enable_loader_override=False):
    from fuzz.targets import TARGETS

if __name__ == "__main__":
    target, *options = sys.argv[1:]
    # libFuzzer starts itself again to merge, with a shell.
    atheris.Setup([f"{sys.executable} -m fuzz.engine {target}", *options], TARGETS[target])
    atheris.Fuzz()
