"""What each client sends, drawn from a seed: the same requests for every server, however fast it is."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["answer", "stream", "fixed", "cancel", "malformed", "over-long"]
# Of 20 requests; "fixed" ones are asked again and again, and their answers compared.
SHARES: dict[Kind, int] = {"answer": 6, "stream": 4, "fixed": 4, "cancel": 3, "malformed": 2, "over-long": 1}
MAX_TOKENS = 32
FIXED_PROMPTS = 12
FIXED_TOKENS = 24
# Each is refused, in part by vLLM's validation and in part by its engine's; values over a good request's.
MALFORMED: tuple[dict[str, Any], ...] = (
    {"max_tokens": -1},
    {"max_tokens": "many"},
    {"temperature": -2},
    {"temperature": "hot"},
    {"top_p": 7},
    {"top_k": -9},
    {"n": 0},
    {"n": 2.5},
    {"prompt": []},
    {"prompt": {"text": "x"}},
    {"prompt": [2**40]},
    {"logprobs": 10**6},
    {"logprobs": -3},
    {"stop": 7},
    {"seed": "x"},
    {"model": "another"},
    {"stream": "perhaps"},
    {"stream_options": {"include_usage": True}},
    {"logit_bias": {"5": "x"}},
    {"logit_bias": {"999999": 1}},
    {"structured_outputs": {"json": "{"}},
    {"structured_outputs": {"regex": "("}},
    {"min_tokens": 9, "max_tokens": 3},
    {"presence_penalty": 99},
    {"repetition_penalty": 0},
)
# Bodies that are no JSON object.
BROKEN: tuple[bytes, ...] = (b"", b"{", b"[]", b"null", b'{"prompt": "\xff"}', b"\x00" * 64, b"[" * 5000)


@dataclass(frozen=True)
class Request:
    """One request.

    Attributes:
        kind: what is wrong or right with it.
        body: fields of a completion; bytes are sent as they are.
        number: of the fixed prompt.
        patience: a cancelled stream is left after so many chunks, a cancelled answer after so many hundredths of
            a second.
    """

    kind: Kind
    body: dict[str, Any] | bytes
    number: int = 0
    patience: int = 0


class Plan:
    """Endless requests of each client.

    Args:
        seed: equal seeds give equal requests.
        vocab_size: token ids are below it.
        context: tokens that the model takes, prompt and answer together.
    """

    def __init__(self, seed: int, vocab_size: int, context: int) -> None:
        self._seed, self._vocab_size, self._context = seed, vocab_size, context
        draw = random.Random(f"{seed} fixed")
        last = context - FIXED_TOKENS
        # From one token to the longest that leaves room for the answer.
        lengths = [1 + round(i * (last - 1) / (FIXED_PROMPTS - 1)) for i in range(FIXED_PROMPTS)]
        self.fixed = [
            Request("fixed", self._greedy(self._tokens(draw, length)), number) for number, length in enumerate(lengths)
        ]

    def requests(self, client: int) -> Iterator[Request]:
        """One client's, without end."""
        draw = random.Random(f"{self._seed} client {client}")
        kinds = [kind for kind, share in SHARES.items() for _ in range(share)]
        while True:
            # every kind comes in each round
            for kind in draw.sample(kinds, len(kinds)):
                yield self._make(kind, draw)

    def _make(self, kind: Kind, draw: random.Random) -> Request:
        if kind == "fixed":
            return draw.choice(self.fixed)
        if kind == "over-long":
            body = self._body(draw, self._context + draw.randrange(1, 4 * self._context))
            return Request(kind, body)
        body = self._body(draw, draw.randrange(1, self._context - 1))
        if kind == "malformed":
            wrong = draw.choice([*MALFORMED, *BROKEN])
            return Request(kind, wrong if isinstance(wrong, bytes) else {**body, **wrong})
        if kind == "cancel":
            body |= {
                "max_tokens": self._context - len(body["prompt"]),
                "ignore_eos": True,
                "stream": draw.random() < 0.5,
            }
            return Request(kind, body, patience=draw.randrange(1, 6))
        return Request(kind, {**body, "stream": kind == "stream"})

    def _body(self, draw: random.Random, length: int) -> dict[str, Any]:
        body: dict[str, Any] = {
            "prompt": self._tokens(draw, length),
            "max_tokens": draw.randint(1, max(1, min(MAX_TOKENS, self._context - length))),
        }
        greedy, some = {"temperature": 0}, {"temperature": 0.8, "top_p": 0.9, "seed": draw.randrange(1000)}
        body |= draw.choice([greedy, some, {**some, "n": 2}, {**greedy, "logprobs": 2}])
        return body

    def _tokens(self, draw: random.Random, length: int) -> list[int]:
        return [draw.randrange(self._vocab_size) for _ in range(length)]

    @staticmethod
    def _greedy(prompt: list[int]) -> dict[str, Any]:
        return {"prompt": prompt, "max_tokens": FIXED_TOKENS, "temperature": 0, "ignore_eos": True, "logprobs": 1}
