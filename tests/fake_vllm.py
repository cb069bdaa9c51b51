"""A vLLM server for tests, without vLLM: it gives prepared answers, or samples from a small model."""

import copy
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch
from safetensors.torch import load_file

from opd.objective import behaviour_logp, draw


def completion(ids=(4, 5, 6, 1), logp=(-0.5, -0.25, -1.0, -2.0)):
    return {"choices": [{"token_ids": ids, "logprobs": {"token_logprobs": logp}}]}


class FakeServer(ThreadingHTTPServer):
    """Answers each path with a value for JSON, or with a function that gets the handler and the body."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked = []
        self.answers = {
            "/version": {"version": "0.32.0"},
            "/v1/models": {"data": [{"id": "student", "max_model_len": 64}]},
            "/is_sleeping": {"is_sleeping": False},
            "/v1/completions": self.complete,
            "/collective_rpc": {"results": [None]},
            "/reset_prefix_cache": {"success": True},
        }
        self.completion = completion()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def complete(self, handler, body):
        is_probe = body["top_k"] == 1
        handler.reply(completion([3] * 8, [0.0] * 8) if is_probe else self.completion)

    def bodies(self, path):
        return [body for asked, body in self.asked if asked == path]


class ModelServer(FakeServer):
    """Samples from a model with the weights that were sent last; before that, with other ones than the model's."""

    def __init__(self, model):
        super().__init__()
        self.model = copy.deepcopy(model)
        for parameter in self.model.parameters():
            parameter.data.neg_()
        self.answers |= {
            "/v1/models": {"data": [{"id": "student", "max_model_len": 4096}]},
            "/v1/completions": self.sample,
            "/collective_rpc": self.reload,
        }

    def reload(self, handler, body):
        self.model.load_state_dict(load_file(Path(body["kwargs"]["weights_path"]) / "model.safetensors"))
        handler.reply({"results": [None]})

    @torch.inference_mode()
    def sample(self, handler, body):
        generator = torch.Generator().manual_seed(body["seed"])
        ids, logps = list(body["prompt"]), []
        while len(logps) < body["max_tokens"]:
            logits = self.model(torch.tensor([ids])).logits[:, -1].float()
            if "allowed_token_ids" in body:
                allowed = torch.full_like(logits, -torch.inf)
                allowed[:, body["allowed_token_ids"]] = 0
                logits += allowed
            logp = behaviour_logp(logits, body["temperature"] or 1.0, body["top_k"], body["top_p"])
            drawn = draw(logp, torch.rand(1, generator=generator, dtype=torch.float64))
            ids.append(int(drawn if body["temperature"] else logits.argmax()))
            logps.append(float(logp[0, ids[-1]]))
            if ids[-1] in body["stop_token_ids"]:
                break
        handler.reply(completion(ids[len(body["prompt"]) :], logps))


class ScoringServer(ModelServer):
    """A teacher: scores prompts with a model and samples from it. `fault(handler, body, answer)` answers a scoring request."""

    def __init__(self, model, tokenizer=None):
        super().__init__(model)
        self.model.load_state_dict(model.state_dict())
        self.tokenizer = tokenizer
        self.fault = lambda handler, body, answer: handler.reply(answer)
        self.answers |= {
            "/v1/models": {"data": [{"id": "teacher", "max_model_len": 4096}]},
            "/v1/completions": self.respond,
            "/detokenize": lambda handler, body: handler.reply({"prompt": self.tokenizer.decode(body["tokens"])}),
        }

    def respond(self, handler, body):
        if "prompt_logprobs" not in body:
            self.sample(handler, body)
            return
        assert body["max_tokens"] == 1 and "echo" not in body
        self.fault(handler, body, self.scores(body["prompt"], body["prompt_logprobs"]))

    @torch.inference_mode()
    def scores(self, ids, top=0):
        logp = self.model(torch.tensor([ids])).logits[0, :-1].float().log_softmax(-1)
        entries = [
            {str(each): {"logprob": float(row[each]), "rank": 1} for each in (*row.topk(top).indices.tolist(), token)}
            for row, token in zip(logp, ids[1:], strict=True)
        ]
        return {"model": "teacher", "choices": [{"index": 0, "text": "x", "prompt_logprobs": [None, *entries]}]}


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        size = int(self.headers.get("Content-Length", 0))
        body = json.loads(self.rfile.read(size)) if size else None
        self.server.asked.append((self.path, body))
        answer = self.server.answers.get(self.path, lambda handler, body: handler.send_error(404))
        if callable(answer):
            answer(self, body)
        else:
            self.reply(answer)

    do_POST = do_GET

    def reply(self, answer, status=200, length=None):
        data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data) if length is None else length))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


@contextmanager
def running(server: FakeServer) -> Iterator[FakeServer]:
    """Let the server answer for the block."""
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
