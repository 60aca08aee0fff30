"""Real `vllm serve` processes of a compressed checkpoint and its dense twin, asked the same by an `openai` client."""

import json
import math
import os
import re
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import APIConnectionError, APIStatusError, OpenAI
from safetensors.torch import load_file

from benchmarks.models.reference_models import build_reference_model, preset_config
from benchmarks.models.reference_models.build import HELDOUT_FILE
from benchmarks.serving.server import VllmServer
from compress_tools.config import make_config
from compress_tools.pipeline import compress
from compress_tools.stored.restore import restore
from tests.resmoe_vllm import serving
from tests.resmoe_vllm.adapters import ATTENTION, RANK, write_adapter

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
CONTEXT = 128
CHAT_TEMPLATE = "{% for m in messages %}<{{ m.role }}> {{ m.content }}\n{% endfor %}<assistant>"
MODEL = "tiny"
COMMON = (
    "--served-model-name", MODEL, "--enforce-eager", "--block-size", "32", "--enable-prompt-tokens-details",
    "--num-gpu-blocks-override", "128", "--dtype", "float32",
    "--structured-outputs-config", '{"backend": "xgrammar", "disable_any_whitespace": true}',
)  # fmt: skip
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}
PROMPT = 'def read_lines(path):\n    """'
# What a server sees of the machine, not of this process, in which tests start vLLM too.
ENV = {name: value for name, value in serving.CLEAN_ENV.items() if name.startswith("VLLM_")}


@dataclass(frozen=True)
class Servers:
    """All that run: the dense twin, the compressed checkpoint, and that one again from a directory nobody can write."""

    dense: VllmServer
    small: VllmServer
    read_only: VllmServer


def client_of(server: VllmServer) -> OpenAI:
    return OpenAI(base_url=f"{server.base_url}/v1", api_key="none", timeout=120, max_retries=0)


def server_of(folder: Path, *options: str, template: Path, log: Path) -> VllmServer:
    more = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
    return VllmServer(folder, [*COMMON, "--chat-template", str(template), *options], env=ENV | more, log_path=log)


def mounted_read_only(folder: Path, target: Path) -> Callable[[], object]:
    """Make ``target`` the same directory, not to be written; where no mounts are allowed, without write permissions.

    Returns:
        what undoes it.
    """
    target.mkdir()
    if subprocess.run(["mount", "--bind", folder, target], capture_output=True).returncode == 0:
        subprocess.run(["mount", "-o", "remount,ro,bind", target], check=True)
        return lambda: subprocess.run(["umount", "--lazy", target], check=True)
    target.rmdir()
    target.symlink_to(folder)
    folder.chmod(0o555)
    return lambda: folder.chmod(0o755)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``small``, its ``twin``, a ``template`` of chats, and adapters on ``attention`` and ``experts``."""
    root = tmp_path_factory.mktemp("server")
    config = preset_config("tiny", dtype="float32", context_length=CONTEXT)
    build_reference_model(config, root / "original")
    compress(root / "original", root / "small", make_config(method="quantize"))
    restore(root / "small", root / "twin")
    (root / "template").write_text(CHAT_TEMPLATE)
    weights = load_file(root / "original" / "model.safetensors")
    write_adapter(root / "attention", weights, config.num_layers, ATTENTION)
    expert = "block_sparse_moe.experts.1.w1"
    write_adapter(root / "experts", weights, config.num_layers, (*ATTENTION, expert))
    return root


@pytest.fixture(scope="module")
def servers(folder: Path) -> Iterator[Servers]:
    """Three, started at once."""
    adapters = ("--enable-lora", "--max-lora-rank", str(RANK), "--lora-modules", f"adapted={folder / 'attention'}")
    with ExitStack() as stack:
        stack.callback(mounted_read_only(folder / "small", folder / "mounted"))
        options = {
            "dense": (folder / "twin",),
            "small": (folder / "small", *adapters),
            "read_only": (folder / "mounted", "--speculative-config", json.dumps(NGRAM)),
        }
        made = {
            name: server_of(*words, template=folder / "template", log=folder / f"{name}.log")
            for name, words in options.items()
        }
        with ThreadPoolExecutor() as pool:
            started = [pool.submit(server.__enter__) for server in made.values()]
        running = [attempt for attempt in started if attempt.exception() is None]
        for attempt in running:
            stack.callback(attempt.result().stop)
        for attempt in started:
            attempt.result()
        yield Servers(**made)


def ask(client: OpenAI, prompt: Any = PROMPT, **options: Any) -> Any:
    """A completion; greedy unless said otherwise."""
    return client.completions.create(model=options.pop("model", MODEL), prompt=prompt, **{"temperature": 0} | options)


def texts(answer: Any) -> list[Any]:
    """What a completion says, and why each choice ended."""
    return [(choice.text, choice.finish_reason) for choice in answer.choices] + [answer.usage.completion_tokens]


def chat(client: OpenAI, **options: Any) -> Any:
    messages = [{"role": "system", "content": "Code only."}, {"role": "user", "content": "import os"}]
    return client.chat.completions.create(
        model=MODEL, messages=messages, **{"temperature": 0, "max_tokens": 16} | options
    )


def asked_for_logprobs(client: OpenAI) -> list[Any]:
    chosen = ask(client, max_tokens=12, logprobs=4, echo=True).choices[0].logprobs
    # the first token has none
    return [chosen.tokens, chosen.token_logprobs[1:], [sorted(step.values()) for step in chosen.top_logprobs[1:]]]


def asked_to_chat_with_logprobs(client: OpenAI) -> list[Any]:
    steps = chat(client, logprobs=True, top_logprobs=3).choices[0].logprobs.content
    return [[step.token, step.logprob, sorted(top.logprob for top in step.top_logprobs)] for step in steps]


def streamed(client: OpenAI) -> list[Any]:
    chunks = list(ask(client, max_tokens=24, stream=True, stream_options={"include_usage": True}))
    return ["".join(c.text for chunk in chunks for c in chunk.choices), chunks[-1].usage.completion_tokens]


def chat_streamed(client: OpenAI) -> list[Any]:
    chunks = list(chat(client, stream=True))
    return ["".join(chunk.choices[0].delta.content or "" for chunk in chunks), chunks[-1].choices[0].finish_reason]


def structured(client: OpenAI, **rules: Any) -> list[Any]:
    return texts(ask(client, max_tokens=64, extra_body={"structured_outputs": rules}))


SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "kind": {"enum": ["file", "folder"]}},
    "required": ["ok", "kind"],
    "additionalProperties": False,
}
SAMPLED = {"temperature": 0.9, "top_p": 0.95, "max_tokens": 16}
QUESTIONS: dict[str, Callable[[OpenAI], Any]] = {
    "completion": lambda client: texts(ask(client, max_tokens=24)),
    "several prompts": lambda client: texts(ask(client, ["import ", "class A", PROMPT], max_tokens=8)),
    "tokens as a prompt": lambda client: texts(ask(client, [5, 17, 300, 44], max_tokens=8)),
    "echo": lambda client: texts(ask(client, max_tokens=4, echo=True)),
    "stream": streamed,
    "logprobs": asked_for_logprobs,
    "chat": lambda client: [choice.message.content for choice in chat(client).choices],
    "chat, stream": chat_streamed,
    "chat, logprobs": asked_to_chat_with_logprobs,
    "n = 3": lambda client: texts(ask(client, n=3, seed=5, **SAMPLED)),
    "seeds": lambda client: [texts(ask(client, seed=seed, **SAMPLED)) for seed in range(4)],
    "stop": lambda client: texts(ask(client, max_tokens=48, stop=["e", "("])),
    "penalties": lambda client: texts(ask(client, max_tokens=16, presence_penalty=1, frequency_penalty=0.5)),
    "bias": lambda client: texts(ask(client, max_tokens=8, logit_bias={"40": 30})),
    "at least": lambda client: texts(ask(client, max_tokens=20, extra_body={"min_tokens": 20, "top_k": 5})),
    "JSON schema": lambda client: structured(client, json=SCHEMA),
    "regular expression": lambda client: structured(client, regex="[0-9]{4}-[a-f]{2}"),
    "choice": lambda client: structured(client, choice=["yes", "no", "perhaps"]),
    "chat, JSON": lambda client: [
        choice.message.content
        for choice in chat(
            client,
            max_tokens=64,
            response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}},
        ).choices
    ],
}


def assert_same(found: Any, expected: Any) -> None:
    """Equal, log-probabilities nearly so."""
    if isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), (found, expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, abs=1e-3)
    else:
        assert found == expected


@pytest.mark.parametrize("question", QUESTIONS)
def test_the_twins_give_the_same_answer(servers: Servers, question: str):
    expected = QUESTIONS[question](client_of(servers.dense))
    assert expected
    assert_same(QUESTIONS[question](client_of(servers.small)), expected)


# With speculation vLLM has no min_tokens, penalties and biases beside it, and draws by seeds in another order.
PLAIN = ("completion", "several prompts", "stream", "chat", "chat, logprobs", "stop", "regular expression")


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file's size and time of its last change."""
    return {path.name: (path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("question", PLAIN)
def test_speculation_on_a_read_only_directory_gives_the_same_answer(servers: Servers, question: str):
    """Two servers run on one directory; this one drafts by what was said before."""
    expected = QUESTIONS[question](client_of(servers.dense))
    found = QUESTIONS[question](client_of(servers.read_only))
    assert_same(found, expected)


def test_speculation_drafts(servers: Servers):
    repeated = "import os\n" * 6
    assert ask(client_of(servers.read_only), repeated, max_tokens=16).choices[0].text
    assert metric(servers.read_only, "vllm:spec_decode_num_draft_tokens_total") > 0
    assert metric(servers.small, "vllm:spec_decode_num_draft_tokens_total") == 0


def metric(server: VllmServer, name: str) -> float:
    """A counter of /metrics, summed."""
    lines = httpx.get(f"{server.base_url}/metrics", timeout=60).text.splitlines()
    return math.fsum(float(line.rsplit(" ", 1)[1]) for line in lines if re.match(rf"{name}[ {{]", line))


def test_what_structures_ask_for_comes(servers: Servers):
    client = client_of(servers.small)
    assert re.fullmatch("[0-9]{4}-[a-f]{2}", structured(client, regex="[0-9]{4}-[a-f]{2}")[0][0])
    assert structured(client, choice=["yes", "no"])[0][0] in ("yes", "no")
    made = json.loads(structured(client, json=SCHEMA)[0][0])
    assert set(made) == {"ok", "kind"}


def test_seeds_repeat_and_differ(servers: Servers):
    client = client_of(servers.small)
    answers = [ask(client, seed=seed, **SAMPLED).choices[0].text for seed in (1, 2, 3, 1)]
    assert answers[0] == answers[3]
    assert len(set(answers)) > 1


def test_a_cached_prefix_changes_no_answer(servers: Servers, folder: Path):
    # three blocks of 32 and a little, of a text that no other test asks
    prompt = [int(byte) + 1 for byte in (folder / "original" / HELDOUT_FILE).read_bytes()[5000:5100]]
    for server in (servers.dense, servers.small):
        first, second = (ask(client_of(server), prompt, max_tokens=12, logprobs=0) for _ in range(2))
        assert second.usage.prompt_tokens_details.cached_tokens == 96
        assert first.choices[0].text == second.choices[0].text
        assert_same(second.choices[0].logprobs.token_logprobs, first.choices[0].logprobs.token_logprobs)


WRONG: dict[str, dict[str, Any]] = {
    "over-long prompt": {"prompt": [7] * (CONTEXT + 1)},
    "negative": {"max_tokens": -1},
    "no such token": {"prompt": [2**31]},
    "no such model": {"model": "another"},
    "temperature": {"temperature": -1},
    "stop": {"stop": {}},
    "broken expression": {"extra_body": {"structured_outputs": {"regex": "("}}},
}


@pytest.mark.parametrize("wrong", WRONG)
def test_the_twins_refuse_in_the_same_words(servers: Servers, wrong: str):
    told = []
    for server in (servers.dense, servers.small):
        with pytest.raises(APIStatusError) as caught:
            ask(client_of(server), **{"prompt": PROMPT} | WRONG[wrong])
        told.append((caught.value.status_code, re.sub(r"\[[\d:]+\]", "", caught.value.message)))
    assert 400 <= told[0][0] < 500
    assert told[0] == told[1]


def test_an_adapter_on_attention_is_a_model_of_its_own(servers: Servers):
    """That its answers are right: test_vllm_lora."""
    client = client_of(servers.small)
    assert {model.id for model in client.models.list()} == {MODEL, "adapted"}
    before = texts(ask(client, max_tokens=24))
    assert texts(ask(client, max_tokens=24, model="adapted")) != before
    assert texts(ask(client, max_tokens=24)) == before


def test_an_adapter_on_experts_is_refused_and_the_server_goes_on(servers: Servers, folder: Path):
    asked = {"lora_name": "experts", "lora_path": str(folder / "experts")}
    refused = httpx.post(f"{servers.small.base_url}/v1/load_lora_adapter", json=asked, timeout=120)
    assert refused.status_code >= 400
    assert "resmoe doesn't support LoRA on experts" in refused.text + servers.small.log
    assert_same(texts(ask(client_of(servers.small))), texts(ask(client_of(servers.dense))))


def test_the_directory_cannot_be_written(servers: Servers, folder: Path):
    if os.access(folder / "mounted", os.W_OK):
        pytest.skip("root writes where permissions forbid it, and this machine allows no read-only mount")
    with pytest.raises(OSError, match=r"Read-only file system|Permission denied"):
        (folder / "mounted" / "written").touch()
    assert texts(ask(client_of(servers.read_only))) == texts(ask(client_of(servers.small)))


def answers_until_cut(client: OpenAI, tokens: int, begun: threading.Event) -> bool:
    """Ask for one stream after the other until the server is gone.

    Args:
        client: of that server.
        tokens: of each answer.
        begun: is set once a first piece has come.
    Returns:
        whether a request was cut, not one refused that came too late.
    """
    try:
        while True:
            for _ in ask(client, max_tokens=tokens, stream=True, extra_body={"ignore_eos": True}):
                begun.set()
    except APIConnectionError as err:
        return "Connection refused" not in str(err.__cause__)


def test_killed_while_it_streams_and_started_again_it_gives_the_same_answers(servers: Servers, folder: Path):
    """Two servers have one directory: the other one answers at the same time, and all through it."""
    client, other = client_of(servers.small), client_of(servers.read_only)
    expected = {question: QUESTIONS[question](client) for question in PLAIN}
    before = contents(folder / "small")
    # of different lengths, so that they don't end all at once
    begun = {tokens: threading.Event() for tokens in (100, 85, 70, 55)}
    with ThreadPoolExecutor() as pool:
        cut = [pool.submit(answers_until_cut, client, *stream) for stream in begun.items()]
        assert all(event.wait(60) for event in begun.values())
        at_once = texts(ask(other, max_tokens=24))
        servers.small.kill()
    results = [future.result() for future in cut]
    assert any(results), results
    assert at_once == texts(ask(other, max_tokens=24)) == expected["completion"]
    with pytest.raises(APIConnectionError):
        ask(client)
    servers.small.__enter__()
    with ThreadPoolExecutor() as pool:
        for question in PLAIN:
            one, two = pool.submit(QUESTIONS[question], client), pool.submit(QUESTIONS[question], other)
            assert_same(one.result(), expected[question])
            assert_same(two.result(), expected[question])
    assert contents(folder / "small") == before
