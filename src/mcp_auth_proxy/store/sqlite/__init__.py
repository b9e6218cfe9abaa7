"""The store as one SQLite file in WAL mode.

``bootstrap.py`` inspects the file before anything is written to it, then creates or migrates it; ``schema.py`` has the
migrations, and ``backup.py`` copies the file before one. ``engine.py`` owns the connection of the running process.
"""
