"""Loading in transformers works once ResMoE is registered, and fails loudly otherwise: each in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from compress_tools.config import make_config
from compress_tools.format.loading_guard import GUARD_KEY, GUARD_TEXT
from compress_tools.pipeline import compress
from compress_tools.stored.restore import restore

LOAD = "from transformers import AutoModelForCausalLM\nmodel = AutoModelForCausalLM.from_pretrained({path!r})\n"
IS_FACTORED = (
    "from compress_tools.hf.factored_experts import FactoredExperts\n"
    "assert any(isinstance(module, FactoredExperts) for module in model.modules())\n"
)
OUR_FINDERS = "[f for f in sys.meta_path if 'resmoe' in repr(f).lower() or 'compress_tools' in repr(f)]"


def python(script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def small(tiny_olmoe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("registration") / "small"
    compress(tiny_olmoe, path, make_config())
    return path


@pytest.mark.parametrize(
    "before",
    ["", "import compress_tools\n", "import sys; sys.modules['compress_tools'] = None\n"],
    ids=["not-imported", "imported-only", "not-installed"],
)
def test_loading_without_registration_fails_and_says_what_to_do(before: str, small: Path) -> None:
    done = python(before + LOAD.format(path=str(small)))
    assert done.returncode != 0
    assert GUARD_TEXT in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    "imports",
    ["import compress_tools, transformers", "import transformers.modeling_utils, compress_tools"],
    ids=["before", "after"],
)
def test_loading_works_once_registered_whichever_is_imported_first(imports: str, small: Path) -> None:
    twice = "compress_tools.register_with_transformers()\n" * 2
    done = python(f"{imports}\n{twice}{LOAD.format(path=str(small))}{IS_FACTORED}")
    assert done.returncode == 0, done.stderr


def test_checkpoints_from_before_the_guard_load_too(small: Path, tmp_path: Path) -> None:
    for file in small.iterdir():
        (tmp_path / file.name).symlink_to(file)
    config = json.loads((small / "config.json").read_text())
    del config[GUARD_KEY]
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config))
    script = f"import compress_tools\ncompress_tools.register_with_transformers()\n{LOAD.format(path=str(tmp_path))}"
    done = python(script + IS_FACTORED)
    assert done.returncode == 0, done.stderr


def test_the_guard_takes_the_place_of_the_sources_own_key_and_a_restored_checkpoint_has_none(
    tiny_olmoe: Path, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for file in tiny_olmoe.iterdir():
        (source / file.name).symlink_to(file)
    config = {**json.loads((tiny_olmoe / "config.json").read_text()), GUARD_KEY: "model.safetensors"}
    (source / "config.json").unlink()
    (source / "config.json").write_text(json.dumps(config))
    compress(source, tmp_path / "small", make_config())
    assert json.loads((tmp_path / "small" / "config.json").read_text())[GUARD_KEY] == GUARD_TEXT
    restore(tmp_path / "small", tmp_path / "dense")
    assert GUARD_KEY not in json.loads((tmp_path / "dense" / "config.json").read_text())


@pytest.mark.parametrize(
    "imports",
    ["import compress_tools, compress_tools.cli.commands", "import resmoe_vllm; resmoe_vllm.register()"],
    ids=["command", "vllm-plugin"],
)
def test_no_import_hook(imports: str) -> None:
    done = python(f"import sys\n{imports}\nassert not {OUR_FINDERS}, sys.meta_path")
    assert done.returncode == 0, done.stderr


def test_importing_alone_does_not_import_transformers() -> None:
    done = python("import sys, compress_tools.cli.commands; assert 'transformers' not in sys.modules, 'slow start'")
    assert done.returncode == 0, done.stderr
