"""A small server of the OpenAI protocol that says 1 where the candidate is the reference, for tests of the judge.

python judge_stub.py PORT MODEL [--refuse-first N] [--children] [--load SECONDS] [--key KEY] [--say TEXT --exit CODE]
"""

import argparse
import json
import re
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

parser = argparse.ArgumentParser()
parser.add_argument("port", type=int)
parser.add_argument("model")
parser.add_argument("--refuse-first", type=int, default=0, help="answer so many questions with 503")
parser.add_argument("--status", type=int, default=503)
parser.add_argument("--children", action="store_true", help="hold a child process, as an engine does")
parser.add_argument("--load", type=float, default=0.0, help="seconds until it listens, as a model takes to load")
parser.add_argument("--say", default="")
parser.add_argument("--exit", type=int)
parser.add_argument("--key", help="refuse requests without it")
parser.add_argument("--host", default="127.0.0.1")
parser.add_argument("--plain", action="store_true", help="be a web server that is no model server")
options = parser.parse_args()
state = {"asked": 0, "in_flight": 0, "most": 0}
lock = threading.Lock()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format, *arguments):
        pass

    def reply(self, value, status=200):
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def refused(self):
        """Whether a request lacks the key, and so has its answer."""
        if options.key is None or self.headers["Authorization"] == f"Bearer {options.key}":
            return False
        self.reply({"error": "unauthorized"}, 401)
        return True

    def do_GET(self):
        if self.refused():
            return
        if options.plain:
            self.reply({"error": "not found"}, 404)
        elif self.path == "/v1/models":
            self.reply({"data": [{"id": options.model}]})
        elif self.path == "/asked":
            self.reply(state)
        else:
            self.reply({})

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.refused():
            return
        with lock:
            state["asked"] += 1
            state["in_flight"] += 1
            state["most"] = max(state["most"], state["in_flight"])
            refused = state["asked"] <= options.refuse_first
        time.sleep(0.02)
        with lock:
            state["in_flight"] -= 1
        if refused:
            self.reply({"error": "wait"}, options.status)
            return
        text = request["messages"][0]["content"]
        reference = re.search(r"Reference answer: (.*)", text)[1]
        candidate = re.search(r"Candidate answer: (.*)", text)[1]
        assert request["structured_outputs"] == {"choice": ["0", "1"]}
        self.reply({"choices": [{"message": {"content": str(int(reference == candidate))}}]})


if options.say:
    print(options.say, flush=True)
if options.exit is not None:
    sys.exit(options.exit)
if options.children:
    print("child", subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]).pid, flush=True)
time.sleep(options.load)
server = ThreadingHTTPServer((options.host, options.port), Handler)
print("ready", flush=True)
server.serve_forever()
