"""The dashboard at ``/``: every server that a browser's user may use, how it is connected, and what to do about it.

``pages`` has the handlers, ``view`` what they show, ``stream`` the changes while the page is open, ``client_setup`` how
clients are pointed at a server. Imported when the page is first opened.
"""
