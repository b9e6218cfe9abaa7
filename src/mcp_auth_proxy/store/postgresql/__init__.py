"""The store as tables of a PostgreSQL database, read and written with psycopg 3.

``bootstrap.py`` inspects the database before anything is written to it, then creates or migrates the tables;
``schema.py`` has their statements. ``connection.py`` is one connection, on which every wait is bounded, ``pool.py`` has
those of the process, ``listener.py`` hears what others write and what time it is, ``engine.py`` puts them together.
"""
