"""What the demo, the overhead benchmark and the end-to-end tests share: a real engine server, a client, prompts, a checkpoint.

Nothing here imports an engine: the server is a process, and it is spoken to over HTTP. Needs ``httpx``.
"""
