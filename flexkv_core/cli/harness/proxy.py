"""A proxy between a client and a real server that does to what passes what a bad network or a bad server does."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from enum import Enum

PIECE_BYTES = 65536


class Fault(Enum):
    """What happens to answers."""

    NONE = "none"
    BLACK_HOLE = "black hole"  # connections are taken, nothing comes back
    DEAD = "dead"  # connections end at once, open ones with the next piece that comes
    SLOW = "slow"  # each piece waits
    DRIP = "drip"  # a few bytes a second
    TRUNCATE = "truncate"  # the connection ends in the middle of a body
    CORRUPT = "corrupt"  # bytes of a body are others
    ERROR_500 = "500"
    THROTTLE_503 = "503"
    EXPIRED_403 = "403"


_HTTP = {
    Fault.ERROR_500: "500 Internal Server Error",
    Fault.THROTTLE_503: "503 Slow Down",
    Fault.EXPIRED_403: "403 Forbidden",
}
_S3_CODES = {
    Fault.ERROR_500: "InternalError",
    Fault.THROTTLE_503: "SlowDown",
    Fault.EXPIRED_403: "ExpiredToken",
}


@dataclass
class Proxy:
    """Set :attr:`fault` at any time; it holds for what passes from then on. ``delay_s``: of SLOW. ``piece_bytes``: passed on at once at most."""

    target: int
    piece_bytes: int = PIECE_BYTES
    port: int = 0
    fault: Fault = Fault.NONE
    delay_s: float = 0.2
    connections: int = 0
    requests: int = 0  # pieces from clients

    async def listen(self, listener: socket.socket) -> None:
        """Until it is cancelled, and all connections with it."""
        loop = asyncio.get_running_loop()
        connections: set[asyncio.Task[None]] = set()
        try:
            while True:
                client, _ = await loop.sock_accept(listener)
                task = asyncio.create_task(self._serve(client))
                connections.add(task)
                task.add_done_callback(connections.discard)
        finally:
            for task in connections:
                task.cancel()
            await asyncio.gather(*connections, return_exceptions=True)

    async def _serve(self, client: socket.socket) -> None:
        """One connection."""
        self.connections += 1
        with client, socket.socket() as server:
            if self.fault is Fault.DEAD:
                return
            for end in (client, server):
                end.setblocking(False)
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with contextlib.suppress(OSError):
                await asyncio.get_running_loop().sock_connect(server, ("127.0.0.1", self.target))
                await self._pass(client, server)

    async def _pass(self, client: socket.socket, server: socket.socket) -> None:
        ways = [asyncio.create_task(way) for way in (self._up(client, server), self._down(server, client))]
        try:
            await asyncio.gather(*ways)
        finally:  # neither may wait for a socket that is closed
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)

    async def _up(self, client: socket.socket, server: socket.socket) -> None:
        send = asyncio.get_running_loop().sock_sendall
        async for data in self._pieces(client):
            self.requests += 1
            if self.fault is Fault.DEAD:
                raise ConnectionError
            if self.fault in _HTTP:
                if b" HTTP/1.1\r\n" in bytes(data):
                    await send(client, _http_error(self.fault))
                    raise ConnectionError
                continue
            if self.fault is not Fault.BLACK_HOLE:
                await send(server, data)
        server.shutdown(socket.SHUT_WR)

    async def _down(self, server: socket.socket, client: socket.socket) -> None:
        send = asyncio.get_running_loop().sock_sendall
        async for data in self._pieces(server):
            if self.fault is Fault.BLACK_HOLE:
                await asyncio.sleep(3600)
            if self.fault is Fault.SLOW:
                await asyncio.sleep(self.delay_s)
            if self.fault is Fault.DRIP:
                for at in range(len(data)):
                    await send(client, data[at : at + 1])
                    await asyncio.sleep(0.1)
                continue
            if self.fault is Fault.TRUNCATE and len(data) > 1000:
                await send(client, data[: len(data) // 2])
                raise ConnectionError
            if self.fault is Fault.CORRUPT and len(data) > 1000:
                data[-200:-100] = bytes(byte ^ 0x55 for byte in data[-200:-100])
            await send(client, data)
        client.shutdown(socket.SHUT_WR)

    async def _pieces(self, end: socket.socket) -> AsyncIterator[memoryview]:
        """What comes, in one buffer: a proxy that stands for a network shall not cost much of its own."""
        loop = asyncio.get_running_loop()
        buffer = memoryview(bytearray(self.piece_bytes))
        while count := await loop.sock_recv_into(end, buffer):
            yield buffer[:count]


@contextlib.contextmanager
def proxy_to(target: int, fault: Fault = Fault.NONE, piece_bytes: int = PIECE_BYTES) -> Iterator[Proxy]:
    """A proxy to a server on loopback, with an event loop on a thread of its own."""
    proxy = Proxy(target, piece_bytes, fault=fault)
    loop = asyncio.new_event_loop()
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listener:
        listener.setblocking(False)
        proxy.port = listener.getsockname()[1]
        serving = loop.create_task(proxy.listen(listener))

        def run() -> None:
            with contextlib.suppress(asyncio.CancelledError):
                loop.run_until_complete(serving)
            loop.close()

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        try:
            yield proxy
        finally:
            loop.call_soon_threadsafe(serving.cancel)
            thread.join(10)


def _http_error(fault: Fault) -> bytes:
    body = f"<Error><Code>{_S3_CODES[fault]}</Code></Error>"
    return (
        f"HTTP/1.1 {_HTTP[fault]}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n{body}".encode()
    )
