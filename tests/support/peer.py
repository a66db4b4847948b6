"""A server of raw bytes: whatever a test wants of one that answers slowly, wrongly or without end."""

import re
import socket
import threading
import time


def head(*lines, status="200 OK", length=0):
    return "\r\n".join([f"HTTP/1.1 {status}", f"Content-Length: {length}", *lines, "", ""]).encode()


class Peer:
    """Answers each connection with the pieces that ``answer(request)`` yields, ``pause`` seconds apart."""

    def __init__(self, answer, pause=0.0):
        self._answer, self._pause, self.requests = answer, pause, []
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection):
        with connection:
            try:
                self.requests.append(_request(connection))
                for piece in self._answer(self.requests[-1]):
                    connection.sendall(piece)
                    time.sleep(self._pause)
            except OSError:  # who asked is gone
                pass

    def close(self):
        if self._socket.fileno() >= 0:
            self._socket.shutdown(socket.SHUT_RDWR)
            self._socket.close()


def _request(connection):
    got = b""
    while b"\r\n\r\n" not in got:
        got += connection.recv(65536)
    start, _, body = got.partition(b"\r\n\r\n")
    length = re.search(rb"(?i)content-length: (\d+)", start)
    while length and len(body) < int(length[1]):
        body += connection.recv(65536)
    return (start + b"\r\n\r\n" + body).decode()
