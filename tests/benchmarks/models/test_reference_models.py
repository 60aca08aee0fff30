"""The reference models: data split, tokenizer, training, checkpoint, and every refusal."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.models.reference_models import PRESETS, build, build_reference_model, preset_config
from benchmarks.models.reference_models import __main__ as cli
from benchmarks.models.reference_models.bigram import bigram_counts, fit_bigrams
from benchmarks.models.reference_models.corpus import HELD_OUT, read_corpus
from benchmarks.models.reference_models.model import (
    expert_modules,
    new_model,
    residual_energy_shares,
    train_only,
    upcycle,
)
from benchmarks.models.reference_models.tokenizer import END_OF_TEXT, encode_documents, train_tokenizer
from benchmarks.models.reference_models.train import Phase, heldout_loss, learning_rate, train_phase, window_batches


@pytest.fixture(scope="module")
def corpus():
    return read_corpus(max_train_bytes=200_000)


@pytest.fixture(scope="module")
def tokenizer(corpus):
    return train_tokenizer([module.text for module in corpus.train], vocab_size=384, model_max_length=32)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    out_dir = tmp_path_factory.mktemp("upcycled") / "model"
    return out_dir, build_reference_model(preset_config("tiny"), out_dir)


def file_digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


# --- corpus


def test_split_is_by_whole_module_and_disjoint():
    corpus = read_corpus()
    train, heldout = {m.name for m in corpus.train}, {m.name for m in corpus.heldout}
    assert not train & heldout
    assert {name.split("/")[0] for name in heldout} == set(HELD_OUT)
    assert not any(name.split("/")[0] in HELD_OUT for name in train)
    assert not any({"site-packages", "test", "tests"} & set(name.split("/")) for name in train | heldout)
    assert sum(len(m.text) for m in corpus.train) > 4_000_000


def test_corpus_is_deterministic_and_capped(corpus):
    assert read_corpus(max_train_bytes=200_000) == corpus
    before_last = sum(len(m.text.encode()) for m in corpus.train[:-1])
    assert before_last < 200_000


def test_corpus_refuses_a_folder_without_source(tmp_path):
    with pytest.raises(FileNotFoundError, match="0 training and 0 held-out"):
        read_corpus(tmp_path)


# --- tokenizer

WEIRD_TEXTS = {
    "all-bytes": bytes(range(256)).decode("latin-1"),
    "whitespace": " \t\t  \n\n\r\n \x0b\x0c  \u00a0\u2003 x  ",
    "scripts": "naïve 日本語 🧪\u200d🔬 \u0301 \ufeff\ufffd \U0010ffff",
    "controls": "\x00\x01\x1b[0m\x7f",
    "code": "def f(x):\n\treturn  {'a' : x**2}  # ok\n",
    "special": f"a{END_OF_TEXT}b",
    "empty": "",
}


@pytest.mark.parametrize("text", WEIRD_TEXTS.values(), ids=WEIRD_TEXTS.keys())
def test_tokenizer_is_lossless(tokenizer, built, text):
    for subject in (tokenizer, AutoTokenizer.from_pretrained(built[0])):
        assert subject.decode(subject.encode(text)) == text


def test_tokenizer_specials_and_size(built):
    reloaded = AutoTokenizer.from_pretrained(built[0])
    assert len(reloaded) == 384
    assert reloaded.eos_token == reloaded.bos_token == reloaded.pad_token == END_OF_TEXT
    assert reloaded.eos_token_id == 0
    saved = json.loads((built[0] / "tokenizer_config.json").read_text())
    assert saved["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_tokenizer_refuses_too_little_text():
    with pytest.raises(ValueError, match="expected 5000"):
        train_tokenizer(["few words"], vocab_size=5000, model_max_length=32)


# --- training


def test_batches_hold_text_windows_once_per_pass():
    batches = window_batches(torch.arange(330), batch_size=2, context_length=32, seed=0)
    one_pass = torch.cat([next(batches) for _ in range(4)])  # [8, 32]
    assert one_pass.shape == (8, 32)
    assert bool((one_pass.diff(dim=1) == 1).all())
    assert one_pass.unique().numel() == one_pass.numel()
    with pytest.raises(ValueError, match="too few"):
        next(window_batches(torch.arange(40), batch_size=2, context_length=32, seed=0))


def test_learning_rate_warms_up_then_falls_to_its_share():
    config = preset_config("tiny", warmup_share=0.1, final_lr_share=0.1)
    rates = [learning_rate(step, 100, 1.0, config) for step in range(101)]
    assert (rates[0], max(rates), rates[100]) == pytest.approx((0.1, 1.0, 0.1))
    assert rates.index(max(rates)) in (9, 10)


def test_bigram_counts_count_pairs():
    assert bigram_counts(torch.tensor([0, 1, 0, 1, 2]), 3).tolist() == [[0, 2, 0], [1, 0, 1], [0, 0, 0]]


def test_bigram_fit_nears_the_bigram_entropy_and_leaves_the_layers():
    config = preset_config("tiny")
    tokens = torch.arange(64).repeat(50)  # each token has one successor: entropy 0
    model = new_model(config, 1, 1, seed=0)
    layers = {name: value.clone() for name, value in model.model.layers.state_dict().items()}
    result = fit_bigrams(model, tokens, steps=60)
    assert result.losses[0] == pytest.approx(5.95, abs=0.1)  # ln 384
    assert result.losses[-1] < 0.2
    assert all(torch.equal(value, layers[name]) for name, value in model.model.layers.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_loss_falls_and_heldout_improves(corpus, tokenizer):
    config = preset_config("tiny")
    tokens = encode_documents(tokenizer, [m.text for m in corpus.train])
    heldout = encode_documents(tokenizer, [corpus.heldout_text()])
    model = new_model(config, config.num_experts, config.top_k, seed=0)
    before, scored = heldout_loss(model, heldout, config)
    seen = []
    phase = Phase("moe", steps=40, peak_lr=1e-2, seed=0)
    result = train_phase(model, tokens, config, phase, progress=lambda *event: seen.append(event))
    after, _ = heldout_loss(model, heldout, config)
    assert scored == 512 // 32 * 31
    assert result.losses[0] == pytest.approx(5.95, abs=0.15)  # ln 384
    assert result.final_loss < result.losses[0] - 1.0
    assert after < before - 1.0
    assert [event[:3] for event in seen] == [("moe", step + 1, 40) for step in range(40)]


# --- upcycling


@pytest.mark.parametrize("architecture", ["mixtral", "olmoe"])
def test_copied_experts_are_equal_and_compute_the_dense_model(architecture):
    config = preset_config("tiny", architecture=architecture)
    dense = new_model(config, 1, 1, seed=3).eval()
    moe = upcycle(dense, config).eval()
    for source, target in zip(expert_modules(dense), expert_modules(moe), strict=True):
        for name in ("gate_up_proj", "down_proj"):
            copies = getattr(target, name)
            assert len(copies) == 4
            assert all(torch.equal(copies[e], getattr(source, name)[0]) for e in range(4))
    assert residual_energy_shares(moe) == pytest.approx([0.0, 0.0], abs=1e-12)
    ids = torch.randint(384, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(moe(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-5)


def test_drop_and_noise_move_the_experts_apart():
    dense = new_model(preset_config("tiny"), 1, 1, seed=3)
    dropped = upcycle(dense, preset_config("tiny", drop_fraction=0.25))
    # Row i survives in an expert with 3/4: residual = 1 - |mean|^2 = 1 - (9/16 + (3/16 + 1/4) / E).
    assert residual_energy_shares(dropped) == pytest.approx([0.328] * 2, abs=0.03)
    noisy = upcycle(dense, preset_config("tiny", expert_noise=0.5))
    # Noise energy 1/4 of the weight's, E - 1 of E parts of it survive the mean: (3/16) / (5/4).
    assert residual_energy_shares(noisy) == pytest.approx([0.15] * 2, abs=0.02)


# --- merging

MERGED = {"recipe": "merged", "expert_steps": 3}


def test_each_expert_is_the_dense_mlp_fine_tuned_on_its_own_part(corpus, tokenizer):
    config = preset_config("tiny", **MERGED)
    tokens = encode_documents(tokenizer, [m.text for m in corpus.train])
    dense = new_model(config, 1, 1, seed=3)
    told = []
    merged, result = build._fine_tune_experts(dense, tokens, config, lambda *event: told.append(event[:3]))
    assert told == [("experts", step + 1, 12) for step in range(12)]
    assert len(result.losses) == 12
    share = max(residual_energy_shares(merged))
    assert 0 < share < 0.2  # a few steps away from each other
    frozen = {name for name, p in merged.named_parameters() if not p.requires_grad}
    trained = {name for name, _ in merged.named_parameters()} - frozen
    assert trained == {f"model.layers.{layer}.mlp.gate.weight" for layer in range(2)}
    theirs = dict(dense.named_parameters())
    for name, value in merged.named_parameters():
        if ".mlp." not in name:
            assert torch.equal(value, theirs[name])
    again = new_model(config, 1, 1, seed=3)
    train_only(again, ".mlp.experts.")
    train_phase(again, tokens.tensor_split(4)[2], config, Phase("experts", 3, config.expert_lr, config.seed + 5))
    assert torch.equal(expert_modules(merged)[1].down_proj[2], expert_modules(again)[1].down_proj[0])


# --- the whole way


def test_report_and_files(built):
    out_dir, report = built
    assert {"config.json", "heldout.txt", "model.safetensors", "reference_model.json", "tokenizer.json"} <= {
        path.name for path in out_dir.iterdir()
    }
    assert (out_dir / "heldout.txt").read_bytes().decode() == read_corpus().heldout_text()
    assert report.heldout_perplexity < 384
    assert 0 < report.residual_energy_share < 1
    assert json.loads(report.to_json())["residual_energy_share"] == report.residual_energy_share
    recipe = json.loads((out_dir / "reference_model.json").read_text())
    assert recipe["config"] == preset_config("tiny").model_dump()
    assert not out_dir.with_name("model.partial").exists()


@pytest.mark.parametrize("architecture", ["mixtral", "olmoe"])
def test_checkpoint_reloads_with_equal_logits(tmp_path, architecture, monkeypatch):
    kept = {}
    save = build._save

    def keep_then_save(model, *rest):
        kept["model"] = model
        save(model, *rest)

    monkeypatch.setattr(build, "_save", keep_then_save)
    changes = {"recipe": "scratch", "dense_steps": 0} if architecture == "olmoe" else {}
    config = preset_config("tiny", architecture=architecture, dtype="float32", **changes)
    report = build_reference_model(config, tmp_path / "m")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    assert type(reloaded) is type(kept["model"])
    assert reloaded.num_parameters() == report.num_params
    ids = torch.randint(384, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(reloaded(ids).logits, kept["model"].eval()(ids).logits)


def test_stored_dtype_and_perplexity_are_those_of_the_file(built):
    out_dir, report = built
    reloaded = AutoModelForCausalLM.from_pretrained(out_dir)
    assert {p.dtype for p in reloaded.parameters()} == {torch.bfloat16}
    tokenizer = AutoTokenizer.from_pretrained(out_dir)
    tokens = encode_documents(tokenizer, [(out_dir / "heldout.txt").read_bytes().decode()])
    loss, scored = heldout_loss(reloaded.float(), tokens, preset_config("tiny"))
    assert scored == report.heldout_tokens_scored
    assert loss == pytest.approx(report.heldout_loss, abs=1e-4)


def test_same_seed_same_bytes_other_seed_other_weights(built, tmp_path):
    build_reference_model(preset_config("tiny"), tmp_path / "again")
    assert file_digests(tmp_path / "again") == file_digests(built[0])
    build_reference_model(preset_config("tiny", seed=1), tmp_path / "other")
    assert file_digests(tmp_path / "other")["model.safetensors"] != file_digests(built[0])["model.safetensors"]


def test_refuses_a_folder_in_use(tmp_path):
    (tmp_path / "kept").write_text("x")
    with pytest.raises(FileExistsError, match="not an empty folder"):
        build_reference_model(preset_config("tiny"), tmp_path)
    assert (tmp_path / "kept").read_text() == "x"


# --- config and command line


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid(name):
    assert preset_config(name).head_dim in (32, 64)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 100}, "multiple of 64"),
        ({"intermediate_size": 96}, "multiple of 64"),
        ({"num_heads": 4}, "hidden_size / num_heads must be one of"),
        ({"num_heads": 3}, "hidden_size / num_heads must be one of"),
        ({"num_heads": 2, "num_kv_heads": 3}, "num_kv_heads must divide"),
        ({"top_k": 5}, "top_k must be at most num_experts 4"),
        ({"num_experts": 1}, "greater than or equal to 2"),
        ({"dense_steps": 0}, "needs dense_steps"),
        ({"recipe": "scratch"}, "no dense phase"),
        ({"recipe": "scratch", "dense_steps": 0, "drop_fraction": 0.1}, "no dense phase"),
        ({"recipe": "scratch", "dense_steps": 0, "moe_steps": 0}, "needs moe_steps"),
        ({"recipe": "merged"}, "expert_steps must be at least 1"),
        ({"expert_steps": 2}, "expert_steps must be 0"),
        (MERGED | {"dense_steps": 0}, "needs dense_steps"),
        (MERGED | {"expert_noise": 0.1}, "must be 0"),
        ({"vocab_size": 100}, "greater than or equal to 320"),
        ({"eval_tokens": 64, "context_length": 128}, "eval_tokens"),
        ({"moe_lr": 0}, "greater than 0"),
        ({"drop_fraction": 1.0}, "less than 1"),
        ({"device": "abacus"}, "device"),
        ({"hiden_size": 64}, "not permitted"),
    ],
    ids=lambda value: ",".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_nonsense_config_is_refused(changes, message):
    with pytest.raises(ValidationError, match=message):
        preset_config("tiny", **changes)


def test_unknown_preset_is_refused():
    with pytest.raises(ValueError, match="known: demo"):
        preset_config("huge")


def test_cli_builds_prints_and_writes_json(tmp_path, capsys):
    report_file = tmp_path / "report.json"
    code = cli.main(["--preset", "tiny", "--out", str(tmp_path / "m"), "--moe-steps", "2", "--json", str(report_file)])
    printed = capsys.readouterr()
    assert code == 0
    assert "held-out perplexity" in printed.out
    assert "residual energy" in printed.out
    assert json.loads(report_file.read_text())["config"]["moe_steps"] == 2


def test_cli_names_the_bad_option(tmp_path, capsys):
    code = cli.main(["--preset", "tiny", "--out", str(tmp_path / "m"), "--top-k", "9", "--seed", "x"])
    assert code == 2
    assert "error: --seed: " in capsys.readouterr().err
    assert not (tmp_path / "m").exists()
