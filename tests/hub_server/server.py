"""The hub's HTTP server: descriptions, files whole and in part, redirects to another host, and failures on request."""

import json
import re
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

from tests.hub_server.repository import HubFile, Repository

_API = re.compile(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?")
_RESOLVE = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
_STORE = re.compile(r"/store/([0-9a-f]{64})")
_RANGE = re.compile(r"bytes=(\d+)-(\d*)")


@dataclass
class Fault:
    """What goes wrong with some requests.

    Attributes:
        pattern: of the request's path.
        times: how often.
        methods: of these requests.
        status: answered instead of the content.
        headers: of that answer.
        cut_after: bytes of the body after which the connection is cut.
        size_off_by: added to the size that a file's head says.
        wait_s: before the answer.
    """

    pattern: str
    times: int = 1
    methods: tuple[str, ...] = ("GET", "HEAD")
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    cut_after: int | None = None
    size_off_by: int = 0
    wait_s: float = 0.0


@dataclass(frozen=True)
class Asked:
    """One request.

    Attributes:
        method: GET or HEAD.
        path: without the query.
        first: byte that was asked for, None for a whole file.
        last: byte that was asked for, None for the end.
        token: that came with it.
        sent: bytes of the body.
    """

    method: str
    path: str
    first: int | None
    last: int | None
    token: str | None
    sent: int


class _Server(ThreadingHTTPServer):
    """Says nothing of clients that go away in the middle, as killed ones do."""

    def handle_error(self, request: object, client_address: object) -> None:
        """Called within the exception's handler."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class HubServer:
    """A hub on loopback; a context.

    Large files are redirected to a store at another origin, as the hub does.

    Attributes:
        repositories: by ``ORG/NAME``.
        faults: still to come.
        asked: requests so far.
        on_request: called before each answer.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.faults: list[Fault] = []
        self.asked: list[Asked] = []
        self.on_request: Callable[[str], None] = lambda path: None
        self._lock = threading.Lock()
        self._http = _Server(("127.0.0.1", 0), self._handler())
        self._http.daemon_threads = True
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    def __enter__(self) -> "HubServer":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    @property
    def endpoint(self) -> str:
        """For ``HF_ENDPOINT``."""
        return f"http://127.0.0.1:{self._http.server_port}"

    @property
    def store(self) -> str:
        """Where large files lie: the same server by another name, which is another origin."""
        return f"http://localhost:{self._http.server_port}"

    def sent(self, name: str) -> int:
        """Bytes of a file that were sent so far."""
        with self._lock:
            paths = {f"/store/{file.sha256}" for file in self._all_files(name)}
            return sum(own.sent for own in self.asked if own.path in paths or own.path.endswith(f"/{name}"))

    def whole(self, name: str) -> int:
        """How often a file was asked for as a whole."""
        with self._lock:
            paths = {f"/store/{file.sha256}" for file in self._all_files(name)}
            return sum(own.method == "GET" and own.path in paths and own.first is None for own in self.asked)

    def _all_files(self, name: str) -> list[HubFile]:
        return [files[name] for own in self.repositories.values() for files in own.commits.values() if name in files]

    def take_fault(self, method: str, path: str) -> Fault | None:
        """The fault of a request, which then happens once less often."""
        with self._lock:
            for fault in self.faults:
                if fault.times > 0 and method in fault.methods and re.search(fault.pattern, path):
                    fault.times -= 1
                    return fault
        return None

    def note(self, asked: Asked) -> None:
        """Add to ``asked``."""
        with self._lock:
            self.asked.append(asked)

    def stored(self, digest: str) -> bytes | None:
        """A large file by its SHA-256."""
        for own in self.repositories.values():
            for files in own.commits.values():
                for file in files.values():
                    if file.sha256 == digest:
                        return file.content
        return None

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(_Handler):
            hub = server

        return Handler


class _Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    protocol_version = "HTTP/1.1"
    hub: HubServer

    def log_message(self, format: str, *args: object) -> None:  # the base class's name
        """Nothing on stderr."""

    def do_HEAD(self) -> None:
        """The head alone."""
        self._answer()

    def do_GET(self) -> None:
        """Head and body."""
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.on_request(path)
        fault = self.hub.take_fault(self.command, path) or Fault("")
        # Not time.sleep, which tests shorten for the client in the same process.
        threading.Event().wait(fault.wait_s)
        if fault.status is not None:
            self._send(fault.status, b"", fault.headers)
        elif match := _API.fullmatch(path):
            self._describe(match[1], match[2] or "main", fault)
        elif match := _RESOLVE.fullmatch(path):
            self._file(match[1], match[2], match[3], fault)
        elif (match := _STORE.fullmatch(path)) and (content := self.hub.stored(match[1])) is not None:
            self._content(content, {"ETag": f'"{match[1]}"'}, fault)
        else:
            self._send(404, b"", {})

    @property
    def _token(self) -> str | None:
        given = self.headers.get("Authorization")
        return None if given is None else given.removeprefix("Bearer ")

    def _repository(self, repo_id: str) -> Repository | None:
        """The repository, or None once the refusal is sent."""
        found = self.hub.repositories.get(repo_id)
        if found is not None and found.token in (None, self._token):
            return found
        if found is not None and found.gated:
            self._send(401 if self._token is None else 403, b"", {"X-Error-Code": "GatedRepo"})
        else:
            status = 401 if self._token is None else 404
            self._send(status, b"", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        return None

    def _describe(self, repo_id: str, revision: str, fault: Fault) -> None:
        if (found := self._repository(repo_id)) is None:
            return
        if (commit := found.resolve(revision)) is None:
            self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
            return
        content = json.dumps(found.described(repo_id, commit)).encode()
        self._send(200, content, {"Content-Type": "application/json"}, fault.cut_after)

    def _file(self, repo_id: str, revision: str, name: str, fault: Fault) -> None:
        if (found := self._repository(repo_id)) is None:
            return
        if (commit := found.resolve(revision)) is None:
            self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
            return
        headers = {"X-Repo-Commit": commit}
        file = found.commits[commit].get(name)
        if file is None:
            self._send(404, b"", {**headers, "X-Error-Code": "EntryNotFound"})
        elif found.is_large(name):
            headers |= {
                "Location": f"{self.hub.store}/store/{file.sha256}",
                "X-Linked-Etag": f'"{file.sha256}"',
                "X-Linked-Size": str(len(file.content) + fault.size_off_by),
            }
            self._send(302, b"", headers)
        else:
            self._content(file.content, {**headers, "ETag": f'"{file.blob_id}"'}, fault)

    def _content(self, content: bytes, headers: dict[str, str], fault: Fault) -> None:
        match = _RANGE.fullmatch(self.headers.get("Range", ""))
        headers |= {"Accept-Ranges": "bytes"}
        if match is None:
            self._send(200, content, headers, fault.cut_after)
            return
        first, last = int(match[1]), min(int(match[2] or len(content) - 1), len(content) - 1)
        if first > last:
            self._send(416, b"", {"Content-Range": f"bytes */{len(content)}"})
            return
        headers |= {"Content-Range": f"bytes {first}-{last}/{len(content)}"}
        self._send(
            206, content[first : last + 1], headers, fault.cut_after, (first, int(match[2]) if match[2] else None)
        )

    def _send(
        self,
        status: int,
        body: bytes,
        headers: dict[str, str],
        cut_after: int | None = None,
        asked: tuple[int | None, int | None] = (None, None),
    ) -> None:
        sent = b"" if self.command == "HEAD" else body if cut_after is None else body[:cut_after]
        path = unquote(urlsplit(self.path).path)
        # Before the bytes: a client that has them all may look at the record at once.
        self.hub.note(Asked(self.command, path, *asked, self._token, len(sent)))
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        # A client that was killed reads no more.
        with suppress(ConnectionError):
            self.wfile.write(sent)
        if cut_after is not None:
            self.wfile.flush()
            self.close_connection = True
