"""Models with Python code of their own: printed commands say that it must be trusted, where it must."""

import json
import shlex
from pathlib import Path

import pytest
import torch

from benchmarks.models.tiny_models import save_tiny_model
from compress_tools.cli.printing import print_report
from compress_tools.config import make_config
from compress_tools.output.target import make_target
from compress_tools.output.trusted_code import missing_code, must_be_trusted
from compress_tools.pipeline import compress
from compress_tools.source.source_reader import SourceReader
from compress_tools.stored.verify import verify

OWN = {"AutoConfig": "configuration_own.Config", "AutoModelForCausalLM": "modeling_own.Model"}
TOKENIZER = {"AutoTokenizer": ["tokenization_own.Slow", None]}


@pytest.mark.parametrize(
    ("config", "tokenizer", "trusted"),
    [
        ({"model_type": "own", "auto_map": OWN}, {}, True),
        # transformers has a class for it, which is better than the model's own.
        ({"model_type": "deepseek_v3", "auto_map": OWN}, {}, False),
        ({"model_type": "own"}, {}, False),
        ({"model_type": "own", "auto_map": "x"}, {"auto_map": ["x"]}, False),
        ({"model_type": "own", "text_config": {"auto_map": OWN}}, {}, True),
        ({"model_type": "mixtral"}, {"auto_map": TOKENIZER, "tokenizer_class": "TikTokenTokenizer"}, True),
        ({"model_type": "mixtral"}, {"auto_map": TOKENIZER, "tokenizer_class": "PreTrainedTokenizerFast"}, False),
    ],
)
def test_what_must_be_trusted(
    config: dict[str, object], tokenizer: dict[str, object], trusted: bool, tmp_path: Path
) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    assert must_be_trusted(tmp_path, config) is trusted


def test_code_that_is_named_and_not_there(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"auto_map": TOKENIZER}))
    (tmp_path / "modeling_own.py").touch()
    elsewhere = {"AutoModel": "owner/name--modeling_far.Model"}
    assert missing_code(tmp_path, {"auto_map": OWN | elsewhere}) == ["configuration_own.py", "tokenization_own.py"]


def test_commands_card_and_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = save_tiny_model("deepseek", tmp_path / "source", torch.float32)
    config = make_config(center="mean", workers=1)
    report = compress(source, tmp_path / "small", config)
    print_report(report, str(tmp_path / "small"), as_json=False)
    last = capsys.readouterr().out.splitlines()[-1]
    assert shlex.split(last.partition("Next: ")[2]) == ["vllm", "serve", str(tmp_path / "small"), "--trust-remote-code"]
    assert "\nvllm serve small --trust-remote-code\n" in (tmp_path / "small/README.md").read_text()
    code = (source / "configuration_deepseek.py").read_bytes()
    assert (tmp_path / "small/configuration_deepseek.py").read_bytes() == code
    verify(tmp_path / "small", source)
    (remark,) = make_target(SourceReader(source), config).remarks()
    assert remark.endswith("(--trust-remote-code)")
    (source / "configuration_deepseek.py").unlink()
    (remark,) = make_target(SourceReader(source), config).remarks()
    assert remark.endswith("(--trust-remote-code), and lacks configuration_deepseek.py")


def test_others_need_no_trust(tiny_olmoe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = compress(tiny_olmoe, tmp_path / "small", make_config(center="mean", workers=1))
    print_report(report, str(tmp_path / "small"), as_json=False)
    assert "--trust" not in capsys.readouterr().out
    assert "--trust" not in (tmp_path / "small/README.md").read_text()
