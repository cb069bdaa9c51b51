"""A JSON client for the inference servers that a run asks: one that samples, or teachers."""

import http.client
import json
import socket
from collections.abc import Mapping
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

from opd.errors import EngineError


class ServerAway(EngineError):
    """A server that does not answer now and may do so later."""


class NoSuchAddress(EngineError):
    """A server that does not have what it is asked for, as it was started without it."""


class Server:
    """A JSON client. Every failure is an `EngineError` of one line, a `ServerAway` where trying again may help.

    Args:
        timeout: Seconds that an answer may take.
        group: Where its options `url` and `timeout` are.
        start: How to start it, for error messages.
        headers: Sent with each request.
    """

    def __init__(self, url: str, timeout: float, group: str, start: str, headers: Mapping[str, str] | None = None) -> None:
        parts = urlsplit(url)
        self.name = f"{group}.url={url}"
        self.address = parts.netloc
        self.connect = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self.timeout = timeout
        self.late = f"see its log, or raise {group}.timeout"
        self.start = start
        self.headers = {"Content-Type": "application/json", **(headers or {})}
        self.open: set[http.client.HTTPConnection] = set()

    def get(self, path: str) -> Any:
        return self.ask("GET", path, None)

    def post(self, path: str, body: object = None, is_json: bool = True) -> Any:
        return self.ask("POST", path, json.dumps(body).encode(), is_json)

    def ask(self, method: str, path: str, body: bytes | None, is_json: bool = True) -> Any:
        connection = self.connect(self.address, timeout=self.timeout)
        self.open.add(connection)
        response: http.client.HTTPResponse | None = None
        try:
            connection.request(method, path, body, self.headers)
            response = connection.getresponse()
            status, answer = response.status, response.read()
        except TimeoutError:
            raise ServerAway(f"{self.name}: no answer to {path} within {self.timeout:g} s; {self.late}") from None
        except (OSError, http.client.HTTPException) as error:
            reason = error or type(error).__name__
            raise ServerAway(f"{self.name}: no answer to {path} ({reason}): is it running? {self.start}") from None
        finally:
            self.open.discard(connection)
            if response is not None:
                response.close()  # it keeps the socket open where its body did not arrive in full
            connection.close()
        if status == 404:
            raise NoSuchAddress(f"{self.name}: it has no {path}: {self.start}")
        if status != 200:
            kind = ServerAway if status == 429 or status >= 500 else EngineError
            raise kind(f"{self.name}: it refuses {path} ({status}): {short(answer)}; see its log")
        try:
            return json.loads(answer) if answer and is_json else None
        except ValueError:
            raise self.error(f"its answer to {path} is not JSON: {short(answer)}") from None

    def hang_up(self) -> None:
        """End all requests of other threads, which otherwise wait for their answers, and this process for them when it ends."""
        for connection in list(self.open):
            if connection.sock is not None:
                with suppress(OSError):
                    connection.sock.shutdown(socket.SHUT_RDWR)

    def error(self, what: str) -> EngineError:
        return EngineError(f"{self.name}: {what}")


def served_models(server: Server) -> dict[str, int]:
    """Return the names of the served models, at least one, and how many tokens each takes. Raises `EngineError` without them."""
    answer = server.get("/v1/models")
    try:
        base = answer["data"][0]["max_model_len"]  # adapters have none of their own
        models = {str(model["id"]): int(model.get("max_model_len") or base) for model in answer["data"]}
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        models = {}
    if not models:
        raise server.error(f"it names no served model: {short(json.dumps(answer).encode())}")
    return models


def short(answer: bytes) -> str:
    return " ".join(answer.decode(errors="replace").split())[:200] or "nothing"
