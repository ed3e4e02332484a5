"""A chat endpoint on this machine, for tests: answers by a script, and notes what it was asked."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Server(ThreadingHTTPServer):
    """Answers with the question and the seed; `script` maps the number of a request to a status or a whole answer."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, script=None, delay=0.0):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script, self.delay = script or {}, delay
        self.bodies, self.headers, self.lock = [], [], threading.Lock()
        self.now = self.most = 0
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, request, client_address):
        """A client that gave up waiting is no news."""

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with server.lock:
            number = len(server.bodies)
            server.bodies.append(body)
            server.headers.append(dict(self.headers))
            server.now += 1
            server.most = max(server.most, server.now)
        time.sleep(server.delay)
        with server.lock:
            server.now -= 1
        scripted = server.script.get(number, server.script.get("all"))
        text = f"{body['messages'][-1]['content']} seed {body['seed']}"
        answer = {"choices": [{"message": {"content": text}, "finish_reason": "stop"}], "usage": {"total_tokens": 10}}
        status = scripted if isinstance(scripted, int) else 200
        data = json.dumps(scripted if isinstance(scripted, dict) else answer).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        return
