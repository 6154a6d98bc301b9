"""A policy server small enough for tests: the OpenAI protocol over HTTP, with scripted turns.

``python tests/policy_server.py PORT PAUSE [MODEL]`` answers each chat completion after PAUSE seconds: a search, then an
answer. With PAUSE ``refuse`` it answers 400 for frames beyond the first message, as a server with too short a context
does. A MODEL other than the default, ``tiny``, gets a child process, as an engine has.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

SEARCH = (
    '<think>Look.</think>\n<tool_call>\n{"name": "seek_video_frames", "arguments": {"query": "star"}}\n</tool_call>'
)
PROTOCOL = frozenset({"model", "messages", "temperature", "top_p", "frequency_penalty", "max_tokens", "seed"})
"""The fields of the protocol that all are sent; others are refused, as `transformers serve` does."""
VLLM = frozenset({"top_k", "min_p", "repetition_penalty"})
"""Further fields that a vLLM is sent: it says who it is where it lists its models."""
ANSWER = "<think>Seen.</think>\n<answer>red</answer>"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    pause = "0"
    model = "tiny"
    owner = "somebody"

    def do_GET(self) -> None:
        self._send(200, {"data": [{"id": self.model, "max_model_len": 4096, "owned_by": self.owner}]})

    def do_POST(self) -> None:
        print("asked", flush=True)
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        messages = asked["messages"]
        roles = [message["role"] for message in messages]
        if wrong := asked.keys() ^ (PROTOCOL | (VLLM if self.owner == "vllm" else set())):
            self._send(422, {"error": {"message": f"Unexpected or missing fields: {sorted(wrong)}"}})
            return
        if self.pause == "refuse":
            if roles[-1] == "tool" and isinstance(messages[-1]["content"], list):
                self._send(400, {"error": {"message": "This model's maximum context length is 64 tokens."}})
                return
        else:
            time.sleep(float(self.pause))
        text = SEARCH if "assistant" not in roles and roles[0] == "system" else ANSWER
        usage = {"prompt_tokens": 100 * len(roles), "completion_tokens": 20, "prompt_tokens_details": None}
        self._send(200, {"choices": [{"message": {"role": "assistant", "content": text}}], "usage": usage})

    def _send(self, status: int, value: dict) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128


if __name__ == "__main__":
    Handler.pause = sys.argv[2]
    if len(sys.argv) > 3:
        Handler.model = sys.argv[3]
        print("child", subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]).pid, flush=True)
    Server(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
