"""A proxy between a client and a real server that does to what passes what a bad network or a bad server does."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
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

    async def serve(self, client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        """One connection."""
        self.connections += 1
        if self.fault is Fault.DEAD:
            to_client.close()
            return
        reader, writer = await asyncio.open_connection("127.0.0.1", self.target, limit=self.piece_bytes)
        try:
            await asyncio.gather(self._up(client, writer, to_client), self._down(reader, to_client))
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            for stream in (writer, to_client):
                with contextlib.suppress(OSError):
                    stream.close()

    async def _up(
        self, client: asyncio.StreamReader, writer: asyncio.StreamWriter, to_client: asyncio.StreamWriter
    ) -> None:
        while data := await client.read(self.piece_bytes):
            self.requests += 1
            if self.fault is Fault.DEAD:
                raise ConnectionError
            if self.fault in _HTTP:
                if b" HTTP/1.1\r\n" in data:
                    to_client.write(_http_error(self.fault))
                    await to_client.drain()
                    raise ConnectionError
                continue
            if self.fault is not Fault.BLACK_HOLE:
                writer.write(data)
                await writer.drain()
        writer.close()

    async def _down(self, reader: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        while data := await reader.read(self.piece_bytes):
            if self.fault is Fault.BLACK_HOLE:
                await asyncio.sleep(3600)
            if self.fault is Fault.SLOW:
                await asyncio.sleep(self.delay_s)
            if self.fault is Fault.DRIP:
                for at in range(len(data)):
                    to_client.write(data[at : at + 1])
                    await asyncio.sleep(0.1)
                continue
            if self.fault is Fault.TRUNCATE and len(data) > 1000:
                to_client.write(data[: len(data) // 2])
                await to_client.drain()
                raise ConnectionError
            if self.fault is Fault.CORRUPT and len(data) > 1000:
                data = data[:-200] + bytes(byte ^ 0x55 for byte in data[-200:-100]) + data[-100:]
            to_client.write(data)
            await to_client.drain()
        to_client.close()


@contextlib.contextmanager
def proxy_to(target: int, fault: Fault = Fault.NONE, piece_bytes: int = PIECE_BYTES) -> Iterator[Proxy]:
    """A proxy to a server on loopback, with an event loop on a thread of its own."""
    proxy = Proxy(target, piece_bytes, fault=fault)
    loop = asyncio.new_event_loop()
    started = threading.Event()

    def run() -> None:
        asyncio.set_event_loop(loop)
        server = loop.run_until_complete(asyncio.start_server(proxy.serve, "127.0.0.1", 0, limit=piece_bytes))
        proxy.port = server.sockets[0].getsockname()[1]
        started.set()
        loop.run_forever()
        server.close()
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert started.wait(10)
    try:
        yield proxy
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)


def _http_error(fault: Fault) -> bytes:
    body = f"<Error><Code>{_S3_CODES[fault]}</Code></Error>"
    return (
        f"HTTP/1.1 {_HTTP[fault]}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n{body}".encode()
    )
