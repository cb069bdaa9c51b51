"""A teacher behind vLLM servers, which score token ids through `/v1/completions` at temperature 1.

An answer counts only if it has a finite log-prob of the very token at every position: anything else ends the run with exit code 76. While
servers are away, requests are repeated until `teacher.timeout` has passed; then the run saves and ends, and the same command resumes it.
Rollouts that are finished are sent while others are still generated.

That it is the right teacher is checked at start (names of tokens, longest sequence, a canary text), by its scores of the first batch
(`opd.teachers.contract`), and with the canary every `teacher.canary_every` steps and before each checkpoint.
"""

import json
import logging
import math
import os
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import count
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from opd import signals
from opd.config.options import TeacherConfig
from opd.data.rollouts import Inputs, Rollout, collate
from opd.errors import EngineError, TeacherError
from opd.models.overlap import Overlap
from opd.models.server import Server, ServerAway, served_models, short
from opd.objective import TeacherStates, TeacherTop
from opd.objective.head import TokenStats
from opd.teachers.base import Scored
from opd.teachers.contract import MAX_SPREAD, check_spread, check_weights, distance, of_spans

log = logging.getLogger(__name__)

KEY = "OPD_TEACHER_API_KEY"
START = "start it as opd/teachers/README.md says"
CONCURRENCY = 8  # sequences scored at a time: a server needs memory for the whole vocabulary at each of their tokens
ATTEMPTS = 4  # that are answered too late within `teacher.timeout`
PAUSES = (0.5, 10.0)  # seconds before the second attempt, and at most
POLL = 0.2  # seconds after which signals are looked at
CANARY_TOKENS = 256
NAMED_TOKENS = 256  # compared by name, in addition to the special ones
MAX_ENTROPY = 0.5  # of a uniform distribution's, ln V: trained models have less than half of that on any text
TOP = 5  # most probable tokens that are looked at for masked ones
MINUS_INFINITY = -9999.0  # what vLLM sends for it


@dataclass(frozen=True, slots=True)
class Scores:
    """A sequence's scores, in nats: the log-probs of all of its tokens but the first, and the most probable ids where they were asked for.

    Args:
        logp: (T - 1,) log-probs.
        top: For each of them the k most probable ids with their log-probs, best first.
    """

    logp: list[float]
    top: list[list[tuple[int, float]]]


class ServedTeacher:
    """Implements `Teacher` for the estimators `sampled` and `topk`; several servers of the same model take turns.

    Args:
        config: With `url`.
        tokenizer: The student's.
        vocabulary: Ids that student and teacher share.
        longest: Tokens of the longest sequence, the one token included that a server generates after it.
        canary: A fixed text's ids.
        k: How many most probable ids are asked for at each token.
        overlap: What the vocabularies share, where each has tokens of its own.

    Raises:
        EngineError: A server does not answer, takes too few tokens, sends fewer ids, or has other names for the tokens.
    """

    def __init__(
        self,
        config: TeacherConfig,
        tokenizer: PreTrainedTokenizerBase,
        vocabulary: int,
        longest: int,
        canary: Sequence[int],
        k: int = 0,
        overlap: Overlap | None = None,
    ) -> None:
        headers = {"Authorization": f"Bearer {os.environ[KEY]}"} if os.environ.get(KEY) else {}
        self.config = config
        self.timeout = config.timeout
        self.servers = [Server(url, config.timeout / ATTEMPTS, "teacher", START, headers) for url in config.urls]
        self.vocabulary = vocabulary
        self.shared = None if overlap is None else torch.tensor(sorted(overlap.shared))
        self.k = min(k or (0 if overlap is None else TOP), vocabulary)
        self.canary = list(canary[:CANARY_TOKENS])
        self.reference: list[float] = []
        self.turns = count()
        self.is_away = False
        self.lock = threading.Lock()
        self.pool = ThreadPoolExecutor(CONCURRENCY, thread_name_prefix="teacher")
        self.over = threading.Event()  # set when nobody waits for the scores any more
        self.begun: dict[tuple[int, ...], Future[Scores]] = {}
        names = {find_model(server, config.path, longest) for server in self.servers}
        if len(names) > 1:
            raise EngineError(f"teacher.url: the servers have different models ({', '.join(sorted(names))}); list servers of one model")
        self.name = names.pop()
        for server in self.servers:
            check_names(server, self.name, tokenizer, vocabulary, overlap)
            if k:
                check_top(server, self.name, self.canary, self.k)

    def logp(self, inputs: Inputs, ids_N: Tensor, temperature: float) -> Tensor:
        return self.columns(inputs, ids_N, temperature)["teacher_logp"]

    def columns(self, inputs: Inputs, ids_N: Tensor, temperature: float) -> TokenStats:
        """Return the columns of the token table. Of masked ids only those count that are among the `TOP` most probable tokens.

        Servers send log-probs over all of their vocabulary. Where masked ids have probability m, `teacher_logp` is log(1 - m) too low, for
        all tokens of that position alike: no expected gradient changes, and the reported KL is too high by -log(1 - m).
        """
        assert temperature == 1.0
        top = self.top(inputs)
        columns = {"teacher_logp": top.token_logp_N}
        if self.shared is not None:
            mass_NK = top.logp_NK.exp().masked_fill(torch.isin(top.id_NK, self.shared.to(top.id_NK.device)), 0)
            highest_N, place_N = mass_NK.max(-1)
            columns["teacher_masked"] = mass_NK.sum(-1)
            columns["teacher_masked_id"] = top.id_NK.gather(-1, place_N[:, None])[:, 0].where(highest_N > 0, -1)
        return columns

    def states(self, inputs: Inputs) -> TeacherStates:
        raise NotImplementedError("servers send no whole distributions; the config refuses what needs them")

    def top(self, inputs: Inputs) -> TeacherTop:
        sequences = list(unpack(inputs))
        scores = self.score([ids for ids, _ in sequences])
        # Position 0 of a sequence has no score: the one of the token after `position` has that index.
        places = [(own, position) for own, (_, positions) in zip(scores, sequences, strict=True) for position in positions]
        device = inputs.ids_BT.device
        pairs = torch.tensor([own.top[position] for own, position in places] if self.k else [], dtype=torch.float64, device=device)
        id_NK, logp_NK = pairs.reshape(len(places), self.k, 2).unbind(-1)
        token_logp_N = torch.tensor([own.logp[position] for own, position in places], dtype=torch.float32, device=device)
        return TeacherTop(id_NK.long(), logp_NK.float(), token_logp_N)

    def expect(self, rollouts: Sequence[Rollout]) -> None:
        sequences = [rollout.request.prompt.seen_by_teacher + rollout.read_by_teacher for rollout in rollouts if rollout.read_by_teacher]
        self.begun |= {ids: self.submit(ids, self.servers, self.k) for ids in sequences}

    def submit(self, ids: Sequence[int], servers: Sequence[Server], k: int) -> "Future[Scores]":
        return self.pool.submit(self.score_one, ids, servers, k, self.over)

    def ready(self) -> AbstractContextManager[None]:
        return nullcontext()

    def active(self) -> AbstractContextManager[None]:
        return nullcontext()

    # Is it the right teacher?

    def check_scores(self, scored: Sequence[Scored]) -> None:
        batches = [collate([one.rollout], [0], pad_id=0) for one in scored]
        sequences = [sequence for batch in batches for sequence in unpack(batch.teacher_inputs)]
        again = self.score([ids for ids, _ in sequences[::-1]], k=0)[::-1]  # in another order, which must not matter
        second = []
        for batch, own, (_, positions) in zip(batches, again, sequences, strict=True):
            second += of_spans(batch, [own.logp[position] for position in positions])
        check_spread(scored, second)
        check_weights(self.config, scored)

    def check(self) -> None:
        """Score the canary with each server. Raises `EngineError` for scores that are not those of the run's start, or carry nothing."""
        for server in self.servers:
            scores = self.score([self.canary], [server], k=1)[0]
            self.check_entropy(server, [pairs[0][1] for pairs in scores.top])
            self.check_drift(server, scores.logp)

    def check_entropy(self, server: Server, highest_logp: Sequence[float]) -> None:
        """Raise `EngineError` for distributions near the uniform one. An entropy is at least minus the highest log-prob."""
        entropy, uniform = -fmean(highest_logp), math.log(self.vocabulary)
        if entropy > MAX_ENTROPY * uniform:
            raise server.error(
                f"its distributions are nearly uniform, with an entropy of at least {entropy:.3g} of {uniform:.3g} nats: has it loaded its "
                "weights?"
            )

    def check_drift(self, server: Server, scores: list[float]) -> None:
        """Raise `EngineError` where the canary's scores are not those of the run's start."""
        self.reference = self.reference or scores
        drift = distance(scores, self.reference)
        if drift > MAX_SPREAD:
            raise server.error(
                f"its scores of a fixed text are {drift:.3g} nats per token from those at the start of the run, more than {MAX_SPREAD:g}: "
                "it has another model; the steps since the last checkpoint are not saved, and the same command resumes"
            )

    # Requests.

    def score(self, sequences: Sequence[Sequence[int]], servers: Sequence[Server] | None = None, k: int | None = None) -> list[Scores]:
        """Return the scores of each sequence. What was begun already is waited for; after an error, or a signal, nothing is.

        Args:
            sequences: Token ids.
            servers: Those to ask, if not all.
            k: How many most probable ids, if not the teacher's own number.

        Raises:
            TeacherError: Servers stay away, refuse, or send anything but one finite log-prob for each token.
            Preempted: This process is asked to stop.
        """
        k = self.k if k is None else k
        begun = {} if servers else self.begun
        futures = [begun.pop(key) if (key := tuple(ids)) in begun else self.submit(ids, servers or self.servers, k) for ids in sequences]
        try:
            pending = set(futures)
            while pending:
                done, pending = wait(pending, POLL, FIRST_EXCEPTION)
                for future in done:
                    future.result()
                signals.check()
            return [future.result() for future in futures]
        except BaseException:
            self.over.set()
            for future in [*futures, *self.begun.values()]:
                future.cancel()
            for server in self.servers:
                server.hang_up()
            self.over, self.begun = threading.Event(), {}
            raise

    def score_one(self, ids: Sequence[int], servers: Sequence[Server], k: int, over: threading.Event) -> Scores:
        body = scoring(self.name, ids, k)
        end, pause = time.monotonic() + self.timeout, PAUSES[0]
        while True:
            server = servers[next(self.turns) % len(servers)]
            try:
                answer = server.post("/v1/completions", body)
                break
            except ServerAway as error:
                if time.monotonic() + pause > end or over.is_set():
                    raise TeacherError(f"{error} (waited for {self.timeout:g} s; the same command resumes)") from None
                self.note(f"{error}; trying again for teacher.timeout={self.timeout:g} s", is_away=True)
                over.wait(pause)
                pause = min(2 * pause, PAUSES[1])
            except EngineError as error:
                raise TeacherError(str(error)) from None
        try:
            scores = read_scores(answer, ids, k)
        except (KeyError, IndexError, TypeError, ValueError):
            what = f"{server.name}: its answer is not one log-prob for each of the {len(ids)} tokens sent"
            raise TeacherError(f"{what}: {short(json.dumps(answer).encode())}") from None
        self.note("the teacher answers again", is_away=False)
        return scores

    def note(self, message: str, is_away: bool) -> None:
        """Warn once when servers are away, and once when they are back."""
        with self.lock:
            if self.is_away != is_away:
                self.is_away = is_away
                log.warning(message)


def scoring(model: str, ids: Sequence[int], k: int) -> dict[str, Any]:
    """Return the request to score a sequence."""
    return {"model": model, "prompt": list(ids), "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": k}


def read_scores(answer: Any, ids: Sequence[int], k: int = 0) -> Scores:
    """Return the scores in an answer. Each position names its token, so that another sequence's answer raises KeyError."""
    (choice,) = answer["choices"]
    entries = choice["prompt_logprobs"][1:]
    logp = [entry[str(token)]["logprob"] for entry, token in zip(entries, ids[1:], strict=True)]
    top = []
    for entry in entries if k else []:
        pairs = sorted(((value["logprob"], int(token)) for token, value in entry.items()), reverse=True)
        top.append([(token, value) for value, token in pairs[:k]])  # the token itself may be one more
    values = logp + [value for pairs in top for _, value in pairs]
    if not all(MINUS_INFINITY < value <= 1e-3 for value in values) or any(len(pairs) < k for pairs in top):  # NaN is not
        raise ValueError
    return Scores(logp, top)


def unpack(inputs: Inputs) -> Iterator[tuple[list[int], list[int]]]:
    """Yield each sequence's ids up to its last trained token, and the positions within it that predict trained tokens."""
    ids, width = inputs.ids_BT.flatten().tolist(), inputs.ids_BT.shape[1]
    predicting_N = inputs.predicting_N
    position_N = predicting_N % width if inputs.positions_BT is None else inputs.positions_BT.flatten()[predicting_N]
    positions_of: dict[int, list[int]] = {}
    for start, position in zip((predicting_N - position_N).tolist(), position_N.tolist(), strict=True):
        positions_of.setdefault(start, []).append(position)
    for start, positions in positions_of.items():
        yield ids[start : start + positions[-1] + 2], positions


def find_model(server: Server, path: str, longest: int) -> str:
    """Return the name of the served model: `path`, or the only one. Raises `EngineError` for one that takes too few tokens."""
    models = served_models(server)
    if path not in models and len(models) > 1:
        raise server.error(f"it serves {', '.join(models)}: set teacher.path to the one that teaches")
    name = path if path in models else next(iter(models))
    if models[name] < longest:
        raise server.error(f"it takes {models[name]} tokens, this run {longest}: start it with --max-model-len {longest}")
    return name


def check_top(server: Server, model: str, ids: Sequence[int], k: int) -> None:
    """Raise `EngineError` unless the server sends the `k` most probable ids."""
    try:
        server.post("/v1/completions", scoring(model, ids, k))
    except ServerAway:
        raise
    except EngineError as error:
        raise EngineError(f"ppo.k={k}: {error}; set ppo.k=20, or start the server with --max-logprobs {k}") from None


def check_names(server: Server, model: str, tokenizer: PreTrainedTokenizerBase, vocabulary: int, overlap: Overlap | None = None) -> None:
    """Raise `EngineError` unless the server has the tokenizer's text for all shared special tokens and a sample of the others."""
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    ids = sorted({*range(0, vocabulary, max(1, vocabulary // NAMED_TOKENS)), *(token for token in special if token < vocabulary)})
    ids = ids if overlap is None else [token for token in ids if token in overlap.shared]
    answer = server.post("/detokenize", {"model": model, "tokens": ids})
    ours, theirs = str(tokenizer.decode(ids)), str(answer.get("prompt")) if isinstance(answer, dict) else ""
    if "".join(theirs.split()) != "".join(ours.split()):  # versions of transformers differ in how they clean up spaces
        at = next((index for index, (one, other) in enumerate(zip(ours, theirs, strict=False)) if one != other), 0)
        shown = f"{ours[at : at + 20]!r}, on the server {theirs[at : at + 20]!r}"
        raise server.error(f"its tokens are not the student's ({len(ids)} compared): here {shown}; serve a model with the same tokenizer")
