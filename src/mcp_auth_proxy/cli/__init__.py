"""The commands. Exit codes: 0 done; 1 it failed, one line says why; 2 usage or configuration."""
