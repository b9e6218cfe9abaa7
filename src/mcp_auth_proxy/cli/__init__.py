"""The commands. Exit codes: 0 success; 1 failure, with one line that says why; 2 usage or configuration error."""
