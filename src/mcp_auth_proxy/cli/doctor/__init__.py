"""``doctor``: discovery as the proxy does it, step by step, and the configuration that would work.

``examine`` asks and judges, with the broker's own code; ``probing`` finds the challenge; ``findings`` puts what was
found into words; ``proposal`` is the configuration, ``providers`` what is known of some authorization servers,
``report`` the result as text and as JSON. Nothing is registered, begun or stored.
"""
