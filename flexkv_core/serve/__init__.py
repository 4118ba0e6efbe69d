"""One BlockManager for several engines of a machine, behind a unix socket.

``wire.py``: the messages. ``address.py``: who may talk to whom. Server: ``server.py`` (the loop), ``session.py`` (one client), ``relay.py`` (copies
that run in clients). Client: ``client.py`` (the methods of a BlockManager), ``link.py`` (one connection), ``choice.py`` (own manager or server).
"""
