"""What outlives the process: grants, registrations and flows in one SQLite file, secrets sealed.

``database.py`` opens the file (``opening.py`` looks before it writes, ``schema.py`` has the tables,
``files.py`` keeps everything 0600) and owns the connection. ``grants.py``, ``registrations.py`` and
``flows.py`` take and give the frozen values of ``models``; ``rows.py`` turns those into rows, ``cipher.py``
seals what is secret in them, ``lease.py`` tells whose refresh is still alive.
"""
