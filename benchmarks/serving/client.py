"""Ask a running server through the `openai` client: completions, streaming, logprobs, and a text's perplexity."""

import math
import statistics
import time
from dataclasses import dataclass

import httpx
from openai import OpenAI

from benchmarks.serving.server import VllmServer

# Prompts of one request, when a text is scored.
WINDOWS_PER_REQUEST = 16


@dataclass(frozen=True)
class StreamedText:
    """A streamed completion. `tokens_per_s` is over the whole request: chunks may reach a busy client in one go."""

    text: str
    num_tokens: int
    first_token_s: float
    tokens_per_s: float


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood of `tokens_scored` tokens.

    Each token but those of the first window was predicted from at least `window - stride` tokens before it.
    """

    value: float
    tokens_scored: int
    window: int
    stride: int


class Client:
    """One server's questions and answers; temperature 0 throughout."""

    def __init__(self, server: VllmServer) -> None:
        self._model = server.model
        self._base_url = server.base_url
        self._openai = OpenAI(base_url=f"{server.base_url}/v1", api_key="none", timeout=300, max_retries=0)

    def complete(self, prompt: str, max_tokens: int) -> str:
        """A completion's text."""
        answer = self._openai.completions.create(model=self._model, prompt=prompt, max_tokens=max_tokens, temperature=0)
        return answer.choices[0].text

    def token_logprobs(self, prompt: str, max_tokens: int) -> list[float]:
        """The log-probabilities of a completion's tokens."""
        answer = self._openai.completions.create(
            model=self._model, prompt=prompt, max_tokens=max_tokens, temperature=0, logprobs=1
        )
        return answer.choices[0].logprobs.token_logprobs

    def stream(self, prompt: str, num_tokens: int) -> StreamedText:
        """Stream exactly `num_tokens` tokens and time them."""
        started = time.perf_counter()
        stream = self._openai.completions.create(
            model=self._model,
            prompt=prompt,
            max_tokens=num_tokens,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        )
        text, first_s, num_tokens = "", None, 0
        for chunk in stream:
            if chunk.usage is not None:
                num_tokens = chunk.usage.completion_tokens
            if chunk.choices:
                first_s = first_s or time.perf_counter() - started
                text += chunk.choices[0].text
        return StreamedText(text, num_tokens, first_s, num_tokens / (time.perf_counter() - started))

    def tokens_per_s(self, prompt: str, num_tokens: int, repeats: int = 3) -> float:
        """Median speed of one stream, prompt included, after one run that is not counted."""
        self.stream(prompt, num_tokens)
        return statistics.median(self.stream(prompt, num_tokens).tokens_per_s for _ in range(repeats))

    def perplexity(self, text: str, window: int = 512, max_tokens: int | None = None) -> Perplexity:
        """Score a text with sliding windows, each token once, at a stride of half a window.

        Args:
            text: tokenized by the server.
            window: tokens of one request; shortened to what the model can take.
            max_tokens: score only this much of the text's beginning.
        """
        tokens, model_limit = self._tokenize(text)
        tokens = tokens[:max_tokens]
        # The server adds one token of its own to every answer.
        window = min(window, model_limit - 1)
        stride = window // 2
        starts = range(0, max(1, len(tokens) - (window - stride)), stride)
        windows = [tokens[start : start + window] for start in starts]
        logprobs: list[float] = []
        for at in range(0, len(windows), WINDOWS_PER_REQUEST):
            answer = self._openai.completions.create(
                model=self._model,
                prompt=windows[at : at + WINDOWS_PER_REQUEST],
                max_tokens=0,
                echo=True,
                logprobs=0,
                temperature=0,
            )
            for choice in answer.choices:
                # A first token has no prediction; what an earlier window scored is not scored again.
                skip = 1 if not logprobs else window - stride
                logprobs += choice.logprobs.token_logprobs[skip:]
        return Perplexity(math.exp(-statistics.fmean(logprobs)), len(logprobs), window, stride)

    def _tokenize(self, text: str) -> tuple[list[int], int]:
        body = {"model": self._model, "prompt": text, "add_special_tokens": False}
        answer = httpx.post(f"{self._base_url}/tokenize", json=body, timeout=300).raise_for_status().json()
        return answer["tokens"], answer["max_model_len"]
