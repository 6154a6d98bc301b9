"""A server of the OpenAI protocol that answers in every wrong way: REPLIES says what an episode makes of each.

A request is answered by the kind that its body names (``reply-as NAME.``), or that its address names
(``http://HOST:PORT/NAME/v1``). A list of models is a good one, unless the address is ``.../models/NAME/v1``.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable, Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

ANSWER = "<think>Seen.</think>\n<answer>red</answer>"
MODELS = {"data": [{"id": "tiny", "max_model_len": 4096}]}
BIG = 200 * 2**20


def http(body: bytes | str, status: str = "200 OK", **headers: str) -> bytes:
    """A whole response."""
    data = body.encode() if isinstance(body, str) else body
    lines = {"Content_Length": str(len(data)), "Content_Type": "application/json", **headers}
    head = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in lines.items() if value)
    return f"HTTP/1.1 {status}\r\n{head}Connection: close\r\n\r\n".encode() + data


def completion(message: Any, **more: Any) -> str:
    return json.dumps({"choices": [{"message": message, "finish_reason": "stop"}], **more})


def says(content: Any, **more: Any) -> bytes:
    """A response whose message has this content."""
    return http(completion({"role": "assistant", "content": content}, **more))


def called(calls: Any) -> bytes:
    return http(completion({"role": "assistant", "content": ANSWER, "tool_calls": calls}))


def endless() -> Iterable[bytes]:
    """A body of 200 MB."""
    yield http("", Content_Length=str(BIG))
    for _ in range(BIG // 2**20):
        yield b" " * 2**20


CHUNKED = {"Content_Length": "", "Transfer_Encoding": "chunked"}
PAGE = "<!DOCTYPE html><html><head><title>Sign in</title></head><body>" + "x" * 9_000 + "</body></html>"
Raw = bytes | Callable[[], Iterable[bytes]]

REPLIES: dict[str, tuple[str, Raw]] = {
    # What is read.
    "plain": ("answered", says(ANSWER)),
    "parts": ("answered", says([{"type": "text", "text": ANSWER[:9]}, {"type": "text", "text": ANSWER[9:]}])),
    "thought": ("answered", http(completion({"content": "<answer>red</answer>", "reasoning_content": "Seen."}))),
    "utf-16": ("answered", http(completion({"content": ANSWER}).encode("utf-16"))),
    "mark": ("answered", http(b"\xef\xbb\xbf" + completion({"content": ANSWER}).encode())),
    "zipped": ("answered", http(gzip.compress(completion({"content": ANSWER}).encode()), Content_Encoding="gzip")),
    "surrogate": ("answered", http(completion({"content": ANSWER + " \ud83d \x00"}))),
    "no-usage": ("answered", says(ANSWER, usage=None)),
    "usage-of-nulls": ("answered", says(ANSWER, usage={"prompt_tokens": None, "prompt_tokens_details": None})),
    "more-cached-than-read": (
        "answered",
        says(ANSWER, usage={"prompt_tokens": 9, "prompt_tokens_details": {"cached_tokens": 99}}),
    ),
    "usage-beyond-numbers": ("answered", http(completion({"content": ANSWER}, usage={"prompt_tokens": 10**400}))),
    "no-calls": ("answered", called([])),
    "redirect": ("answered", http("", "307 Moved", Location="/redirected/v1/chat/completions")),
    "nothing-said": ("unanswered", says(None)),
    # What fits no protocol.
    "page": ("bad_reply", http(PAGE, Content_Type="text/html")),
    "empty": ("bad_reply", http("")),
    "no-content": ("bad_reply", http("", "204 No Content")),
    "words": ("bad_reply", http("internal error\x1b[31m\n\tsee the log")),
    "cut": ("bad_reply", http(completion({"content": ANSWER})[:40])),
    "latin-1": ("bad_reply", http(b'{"choices": [{"message": {"content": "\xe9"}}]}')),
    "deep": ("bad_reply", http("[" * 100_000)),
    "deep-inside": ("bad_reply", http(completion({"content": ANSWER, "x": 0}).replace("0", "[" * 999 + "]" * 999))),
    "events": ("bad_reply", http('data: {"choices": [{"delta": {"content": "r"}}]}\n\ndata: [DONE]\n\n')),
    "null": ("bad_reply", http("null")),
    "number": ("bad_reply", http("1" * 5_000)),
    "list": ("bad_reply", http("[]")),
    "no-choices": ("bad_reply", http("{}")),
    "choices-null": ("bad_reply", http('{"choices": null}')),
    "choices-empty": ("bad_reply", http('{"choices": []}')),
    "choices-words": ("bad_reply", http('{"choices": "red"}')),
    "message-null": ("bad_reply", http(completion(None))),
    "message-list": ("bad_reply", http(completion([ANSWER]))),
    "content-number": ("bad_reply", says(7)),
    "content-object": ("bad_reply", says({"text": ANSWER})),
    "content-image": ("bad_reply", says([{"type": "image_url", "image_url": {"url": "data:,"}}])),
    "content-part-null": ("bad_reply", says([None])),
    "thought-list": ("bad_reply", http(completion({"content": ANSWER, "reasoning": ["Seen."]}))),
    "calls-words": ("bad_reply", called("seek")),
    "calls-of-nulls": ("bad_reply", called([None])),
    "call-nameless": ("bad_reply", called([{"function": {"arguments": "{}"}}])),
    "call-number": ("bad_reply", called([{"function": {"name": "seek_video_frames", "arguments": 7}}])),
    "usage-words": ("bad_reply", says(ANSWER, usage="much")),
    "usage-negative": ("bad_reply", says(ANSWER, usage={"prompt_tokens": -1})),
    "usage-huge": ("bad_reply", http(completion({"content": ANSWER}, usage={"prompt_tokens": 10**30}))),
    "usage-half": ("bad_reply", says(ANSWER, usage={"prompt_tokens": 0.5})),
    "endless": ("bad_reply", endless),
    "not-zipped": ("bad_reply", http("no gzip", Content_Encoding="gzip")),
    "bomb": ("bad_reply", http(gzip.compress(b" " * 2**26), Content_Encoding="gzip")),
    "wrong-chunks": ("bad_reply", http("zz\r\nred\r\n", **CHUNKED)),
    "no-http": ("bad_reply", b"SSH-2.0-OpenSSH_9.2\r\n\r\n"),
    "round-and-round": ("bad_reply", http("", "307 Moved", Location="/round-and-round/v1/chat/completions")),
    "to-another-protocol": ("bad_reply", http("", "307 Moved", Location="ftp://127.0.0.1/x")),
    "to-nowhere": ("bad_reply", http("", "307 Moved", Location="http://127.0.0.1:port/")),
    # What the server refuses.
    "error-in-200": ("refused", http('{"error": {"message": "no such model", "code": "not_found"}}')),
    "wrong-request": ("refused", http('{"error": {"message": "no"}}', "400 Bad Request")),
    "unprocessable": ("refused", http('{"detail": [{"loc": ["body"], "msg": "no"}]}', "422 Unprocessable")),
    "teapot": ("refused", http(PAGE, "418 Teapot")),
    "never-made": ("refused", http("", "501 Not Implemented")),
    "moved-nowhere": ("refused", http("", "302 Found")),
    # What may pass: it is tried again until the patience ends.
    "overloaded-in-200": ("engine", http('{"error": {"message": "overloaded", "code": 503}}')),
    "gateway": ("engine", http("<html><title>502 Bad Gateway</title></html>", "502 Bad Gateway")),
    "shorter-than-said": ("engine", http("{}", Content_Length="99")),
    "half-chunks": ("engine", http("5\r\n{}", **CHUNKED)),
    "closed": ("engine", b""),
}
FAILING = {name: reason for name, (reason, _) in REPLIES.items() if reason in ("bad_reply", "refused", "engine")}


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        kind, _, rest = self.path.removeprefix("/").partition("/")
        if kind == "models":
            self._answer(rest.partition("/")[0])
        elif self.path.endswith("/models"):
            self.wfile.write(http(json.dumps(MODELS)))
        else:
            self.wfile.write(http("", "404 Not Found"))

    def do_POST(self) -> None:
        asked = self.rfile.read(int(self.headers["Content-Length"]))
        named = re.findall(rb"reply-as ([\w-]+)\.", asked)
        kind = self.path.split("/")[1]
        self._answer("plain" if kind == "redirected" else named[-1].decode() if named else kind)

    def _answer(self, kind: str) -> None:
        raw = REPLIES[kind][1]
        try:
            for part in [raw] if isinstance(raw, bytes) else raw():
                self.wfile.write(part)
        except (BrokenPipeError, ConnectionResetError):  # the client has read enough
            pass
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


class ReplyServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def at(self, kind: str) -> str:
        """Base URL at which the server answers so."""
        return f"http://127.0.0.1:{self.server_port}/{kind}/v1"
