"""Eight clients that work through the plan at once, each request's outcome, and the server's memory meanwhile."""

import asyncio
import itertools
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import httpx
import openai

from benchmarks.serving.server import VllmServer
from benchmarks.soak.plan import Plan, Request

CLIENTS = 8
TIMEOUT_S = 120
SAMPLE_S = 0.25
# Memory is told by tenths of the load. The first are not compared: allocators, caches and compiled shapes fill up.
PARTS, WARM_UP = 10, 4
ANSWERED, CANCELLED = "answered", "cancelled"
# Tokens and log-probabilities of an answer, as the server gave them.
Answer = tuple[str, tuple[float, ...]]


@dataclass
class Loaded:
    """What one server did.

    Attributes:
        outcomes: by client, in order: ``answered``, ``cancelled``, ``refused 400``, or what failed.
        changed: fixed prompts whose answer was not the unloaded server's, in words.
        fixed: fixed prompts that were answered under load.
        memory: (requests ended, bytes of the server's processes), in time.
        left: requests that the server still ran a while after the last client was gone.
        healthy_bytes: memory when the server had come up.
        seconds: that the load took.
    """

    outcomes: list[list[str]]
    changed: list[str] = field(default_factory=list)
    fixed: int = 0
    memory: list[tuple[int, int]] = field(default_factory=list)
    left: int = 0
    healthy_bytes: int = 0
    seconds: float = 0.0

    @property
    def sent(self) -> int:
        """Requests in all."""
        return sum(map(len, self.outcomes))

    def count(self, start: str) -> int:
        """Requests with an outcome of these first words."""
        return sum(count for outcome, count in self.kinds().items() if outcome.startswith(start))

    @property
    def failed(self) -> int:
        """Requests that were neither answered nor refused as wrong nor given up by their client."""
        return self.sent - sum(map(self.count, (ANSWERED, CANCELLED, "refused")))

    def kinds(self) -> Counter[str]:
        """Outcomes, counted."""
        return Counter(outcome for client in self.outcomes for outcome in client)

    def growth(self) -> int:
        """Bytes from the first tenth behind the warm-up to the last one."""
        return self.median_bytes(PARTS - 1) - self.median_bytes(WARM_UP)

    def median_bytes(self, part: int) -> int:
        """Median of the memory during a tenth of the load, the last where nothing was sampled."""
        begin, end = part / PARTS * self.sent, (part + 1) / PARTS * self.sent
        chosen = sorted(size for ended, size in self.memory if begin <= ended <= end)
        return chosen[len(chosen) // 2] if chosen else self.memory[-1][1]


def run(server: VllmServer, plan: Plan, requests: int) -> Loaded:
    """Ask the fixed prompts one by one, put the load on, ask them again.

    Args:
        server: healthy.
        plan: what is sent.
        requests: of each client.
    Returns:
        what came of it.
    """
    return asyncio.run(_Run(server, plan).run(requests))


class _Run:
    def __init__(self, server: VllmServer, plan: Plan) -> None:
        self._server, self._plan = server, plan
        self._loaded = Loaded([[] for _ in range(CLIENTS)], healthy_bytes=server.resident_bytes())
        self._expected: list[Answer] = []

    async def run(self, requests: int) -> Loaded:
        async with self._client() as client:
            self._expected = [await self._ask_fixed(client, request) for request in self._plan.fixed]
            await self._compare_unloaded(client, "asked again, unloaded")
            stop, sampler = threading.Event(), threading.Thread(target=self._sample, daemon=True)
            self._stop = stop
            sampler.start()
            begun = time.perf_counter()
            try:
                await asyncio.gather(*(self._work(index, requests) for index in range(CLIENTS)))
            finally:
                stop.set()
                sampler.join()
            self._loaded.seconds = time.perf_counter() - begun
            self._loaded.memory.append((self._loaded.sent, self._server.resident_bytes()))
            self._loaded.left = await self._wait_until_idle()
            await self._compare_unloaded(client, "after the load")
        return self._loaded

    def _client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(
            base_url=f"{self._server.base_url}/v1", api_key="none", timeout=TIMEOUT_S, max_retries=0
        )

    async def _compare_unloaded(self, client: openai.AsyncOpenAI, when: str) -> None:
        for request in self._plan.fixed:
            self._compare(request, await self._ask_fixed(client, request), when)

    async def _work(self, index: int, requests: int) -> None:
        outcomes = self._loaded.outcomes[index]
        async with self._client() as client:
            for request in itertools.islice(self._plan.requests(index), requests):
                outcomes.append(await self._send(client, request))

    async def _send(self, client: openai.AsyncOpenAI, request: Request) -> str:
        try:
            if isinstance(request.body, bytes):
                return await self._send_bytes(request.body)
            if request.kind == "fixed":
                self._compare(request, await self._ask_fixed(client, request), "under load")
                self._loaded.fixed += 1
                return ANSWERED
            if request.kind == "cancel":
                return await self._abandon(client, request)
            made = await self._create(client, request.body)
            if request.body.get("stream") is True:
                return await _read(made)
            return _fault(made, request.body) or ANSWERED
        except openai.APIStatusError as err:
            return _status(err.status_code)
        except (openai.APIConnectionError, openai.APIError, httpx.HTTPError) as err:
            return f"failed: {type(err).__name__}"

    async def _create(self, client: openai.AsyncOpenAI, body: dict[str, Any]) -> Any:
        """A completion; fields go as they are, since some are wrong on purpose."""
        fields = {"model": self._server.model, **body}
        known = {name: fields.pop(name) for name in ("model", "prompt")}
        stream = fields.pop("stream", False)
        if not isinstance(stream, bool):
            fields["stream"], stream = stream, False
        return await client.completions.create(**known, stream=stream, extra_body=fields)

    async def _send_bytes(self, body: bytes) -> str:
        async with httpx.AsyncClient(timeout=TIMEOUT_S) as raw:
            headers = {"Content-Type": "application/json"}
            found = await raw.post(f"{self._server.base_url}/v1/completions", content=body, headers=headers)
        return _status(found.status_code)

    async def _abandon(self, client: openai.AsyncOpenAI, request: Request) -> str:
        body: dict[str, Any] = dict(request.body)
        if not body["stream"]:
            try:
                await asyncio.wait_for(self._create(client, body), request.patience / 100)
            except TimeoutError:
                return CANCELLED
            return ANSWERED
        stream = await self._create(client, body)
        chunks = 0
        async for _ in stream:
            chunks += 1
            if chunks == request.patience:
                await stream.close()
                return CANCELLED
        return ANSWERED

    async def _ask_fixed(self, client: openai.AsyncOpenAI, request: Request) -> Answer:
        choice = (await self._create(client, dict(request.body))).choices[0]
        return choice.text, tuple(choice.logprobs.token_logprobs)

    def _compare(self, request: Request, found: Answer, when: str) -> None:
        expected = self._expected[request.number]
        if found == expected:
            return
        same = found[0] == expected[0]
        gap = max(abs(one - two) for one, two in zip(found[1], expected[1], strict=True))
        what = f"log-probabilities by {gap:.2g}" if same else "the text"
        prompt = len(dict(request.body)["prompt"])
        self._loaded.changed.append(f"fixed prompt {request.number} of {prompt} tokens, {when}: {what}")

    def _sample(self) -> None:
        while not self._stop.wait(SAMPLE_S):
            self._loaded.memory.append((self._loaded.sent, self._server.resident_bytes()))

    async def _wait_until_idle(self, timeout_s: float = 30) -> int:
        """Requests that the server runs or has waiting, once they are none or the time is up."""
        until = time.perf_counter() + timeout_s
        async with httpx.AsyncClient(timeout=TIMEOUT_S) as raw:
            while True:
                metrics = (await raw.get(f"{self._server.base_url}/metrics")).text
                left = sum(_metric(metrics, f"vllm:num_requests_{state}") for state in ("running", "waiting"))
                if not left or time.perf_counter() > until:
                    return left
                await asyncio.sleep(SAMPLE_S)


async def _read(stream: Any) -> str:
    finished = None
    async for chunk in stream:
        for choice in chunk.choices:
            finished = choice.finish_reason or finished
    return ANSWERED if finished in ("stop", "length") else f"failed: a stream ended with {finished}"


def _fault(made: Any, body: dict[str, Any]) -> str | None:
    if len(made.choices) != body.get("n", 1) or any(c.finish_reason not in ("stop", "length") for c in made.choices):
        return f"failed: {len(made.choices)} choices, ended with {[c.finish_reason for c in made.choices]}"
    return None


def _status(code: int) -> str:
    return ANSWERED if code < 400 else f"refused {code}" if code < 500 else f"failed: {code}"


def _metric(text: str, name: str) -> int:
    lines = [line for line in text.splitlines() if line.startswith((f"{name} ", f"{name}{{"))]
    return round(sum(float(line.rsplit(" ", 1)[1]) for line in lines))
