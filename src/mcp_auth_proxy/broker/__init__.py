"""All that the data plane knows of OAuth: token() · challenged() · complete()."""
