"""``completion``, in the real shells as far as they are there."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fakes.proxy import Json, write_config
from mcp_auth_proxy.cli.completion import SHELLS

BASH = """
source {script}
COMP_WORDS=({words}"") COMP_CWORD={count} COMP_LINE= COMP_POINT=0
"$(complete -p mcp-auth-proxy | sed 's/.* -F \\([^ ]*\\).*/\\1/')" mcp-auth-proxy
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
CHECKS = {"bash": ["bash", "-n"], "zsh": ["zsh", "-n"], "fish": ["fish", "--no-execute"]}
"""How each shell only parses a script."""


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A folder in which the shells find the program, its configuration and the scripts."""
    servers: dict[str, str | Json] = {
        "linear": {"url": "https://mcp.linear.app/mcp", "accounts": {"work": {}}},
        "notes": "https://n.example/mcp",
    }
    write_config(tmp_path, servers)
    program = tmp_path / "mcp-auth-proxy"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -c "from mcp_auth_proxy.cli.main import main; main()" "$@"\n')
    program.chmod(0o755)
    return tmp_path


def run(machine: Path, *command: str) -> str:
    env = {
        **os.environ,
        "PATH": f"{machine}:{os.environ['PATH']}",
        "HOME": str(machine),
        "XDG_CONFIG_HOME": str(machine),
    }
    done = subprocess.run(command, cwd=machine, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


def completions(machine: Path, *words: str) -> list[str]:
    """What bash offers after some words."""
    script = machine / "completion.bash"
    script.write_text(run(machine, "mcp-auth-proxy", "completion", "bash"))
    line = " ".join(["mcp-auth-proxy", *words])
    out = run(machine, "bash", "-c", BASH.format(script=script, words=f"{line} ", count=len(words) + 1))
    return [found for found in out.split("\n") if found]


def test_bash_completes_servers_and_their_accounts(machine: Path) -> None:
    for command in (["login"], ["status"], ["install", "cursor"]):
        assert completions(machine, *command) == ["linear", "linear@work", "notes"]


def test_bash_completes_commands_clients_and_options(machine: Path) -> None:
    commands = completions(machine)
    assert {"serve", "login", "status", "install", "completion", "doctor"} <= set(commands)
    assert completions(machine, "install") == [
        *("claude-code", "claude-desktop", "cursor", "vscode", "codex", "gemini")
    ]


def test_what_is_wrong_is_not_printed_over_the_line(machine: Path) -> None:
    script = run(machine, "mcp-auth-proxy", "completion", "bash")
    (machine / "mcp-auth-proxy.yaml").write_text("servers: [")
    (machine / "completion").write_text(script)
    out = run(machine, "bash", "-c", BASH.format(script=machine / "completion", words="mcp-auth-proxy login ", count=2))
    assert out.strip() == ""


@pytest.mark.parametrize("shell", SHELLS)
def test_each_shell_reads_its_script(machine: Path, shell: str) -> None:
    # The shell itself is not needed to print it.
    script = run(machine, "mcp-auth-proxy", "completion", shell)
    assert "_MCP_AUTH_PROXY_COMPLETE" in script
    assert "mcp-auth-proxy" in script
    path = machine / "script"
    path.write_text(script)
    if shutil.which(shell) is not None:
        run(machine, *CHECKS[shell], str(path))
