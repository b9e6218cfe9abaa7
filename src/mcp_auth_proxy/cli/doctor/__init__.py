"""``doctor``: runs discovery as the proxy does, step by step, and shows the configuration that works.

``examine`` runs the steps with the broker's own code; ``probing`` finds the challenge; ``findings`` describes the
results; ``proposal`` is the configuration; ``providers`` has the known needs of some authorization servers; ``report``
is the result as text and JSON. Nothing is registered, started or stored.
"""
