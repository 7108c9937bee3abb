"""The command line on tiny models: what is printed, where, and how it ends."""

import importlib.metadata
import json
import re
import sys

import pytest
from tiny import CHAT_TEMPLATE, byte_tokenizer, tiny_model

import mdm.cli
from mdm.checkpoint import load_denoiser, save_denoiser
from mdm.convert import StudentSettings, convert


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with `ar` and a student `student` made from it."""
    folder = tmp_path_factory.mktemp("models")
    tiny_model("llama", 264, max_position_embeddings=64).save_pretrained(folder / "ar")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder / "ar")
    save_denoiser(convert(StudentSettings(init=str(folder / "ar"))), folder / "student")
    return folder


@pytest.fixture
def mdm_command(monkeypatch, capsys, tmp_path):
    """Run `mdm` with these arguments in an empty folder: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["mdm", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            mdm.cli.main()
        out, err = capsys.readouterr()
        return ended.value.code or 0, out, err

    return run


# --- mdm -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_lists_every_command(mdm_command, flag):
    code, out, _ = mdm_command(flag)
    assert code == 0
    for name in mdm.cli.COMMANDS:
        assert re.search(rf"^  {name} +\S", out, re.M), name


@pytest.mark.parametrize("name", mdm.cli.COMMANDS)
def test_every_command_has_help(mdm_command, name):
    code, out, _ = mdm_command(name, "--help")
    assert code == 0
    assert out.startswith(f"Usage: mdm {name}")


def test_version(mdm_command):
    code, out, _ = mdm_command("--version")
    assert (code, out) == (0, f"mdm, version {importlib.metadata.version('mdm-code')}\n")


def test_a_misspelt_command_is_suggested(mdm_command):
    code, _, err = mdm_command("genrate", "x")
    assert code == 2
    assert "unknown command 'genrate'; did you mean 'generate'?" in err


# --- mdm convert ---------------------------------------------------------------------------------


def test_convert_writes_a_student_and_says_what_it_is(mdm_command, models, tmp_path):
    code, out, _ = mdm_command("convert", models / "ar", "--output", "new/student", "--layers", 1)
    assert code == 0
    student = load_denoiser(tmp_path / "new" / "student")
    assert student.model.config.num_hidden_layers == 1
    assert (
        "new/student: 0.0M parameters, 1 layers, width 32, full canvas, mask <|mask|> (id 259)"
        in out
    )
    assert "shift on" in out


def test_convert_to_blocks(mdm_command, models, tmp_path):
    options = ["--kind", "bd3lm", "--block-size", 8, "--attention", "context_causal"]
    code, out, _ = mdm_command("convert", models / "ar", "--output", "s", *options)
    assert code == 0
    assert "width 32, blocks of 8 (context_causal), mask <|mask|>" in out
    student = load_denoiser(tmp_path / "s")
    assert (student.block_size, student.attention) == (8, "context_causal")


def test_convert_options_reach_the_student(mdm_command, models, tmp_path):
    options = ["--width", 0.5, "--random", "--seed", 7, "--no-shift", "--mask-token", "<|pad|>"]
    options += ["--start-token", "<|end|>", "--end-token", "<|end|>"]
    code, out, _ = mdm_command("convert", models / "ar", "--output", "s", *options)
    assert code == 0
    assert "width 16, full canvas, mask <|pad|> (id 258), shift off" in out
    student = load_denoiser(tmp_path / "s")
    assert (student.vocab.start_id, student.vocab.eos_id, student.mask_id) == (257, 257, 258)
    (step,) = student.lineage
    assert (step["width"], step["random"], step["seed"], step["shift"]) == (0.5, True, 7, False)


@pytest.mark.parametrize(
    ("arguments", "expected_code", "text"),
    [
        (["none", "--output", "s"], 5, "mdm: cannot load a model from 'none'"),
        (["./none", "--output", "s"], 5, "mdm: no model folder at './none'"),
        (["{models}/ar", "--output", "s", "--layers", "9"], 2, "the checkpoint has only 2"),
        (["{models}/ar", "--output", "s", "--width", "2"], 2, r"student.width must be in (0, 1]"),
        (["{models}/ar", "--output", "s", "--mask-token", "a"], 4, "is a word of ordinary text"),
        (["{models}/ar", "--output", "{models}/ar"], 5, "is not an mdm model, so it is kept"),
        (["{models}/ar", "--output", "s", "--block-size", "4"], 2, "needs student.kind=bd3lm"),
        (["{models}/ar", "--output", "s", "--trust-remote-code"], 2, "is for published diffusion"),
        (["{models}/ar"], 2, "Missing option '--output'"),
    ],
)
def test_convert_refuses(mdm_command, models, tmp_path, arguments, expected_code, text):
    arguments = [argument.format(models=models) for argument in arguments]
    code, out, err = mdm_command("convert", *arguments)
    assert (code, out) == (expected_code, "")
    assert text in err
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


# --- mdm generate --------------------------------------------------------------------------------


def test_generate_prints_the_prompt_and_what_follows(mdm_command, models):
    arguments = ["def f(", "--model", models / "student", "--gen-length", 6, "--suppress-eos"]
    code, out, err = mdm_command("generate", *arguments)
    assert code == 0
    assert out.startswith("def f(")
    assert re.fullmatch(r"6 tokens, 6 forwards, \d+\.\d s\n", err)
    assert mdm_command("generate", *arguments)[:2] == (code, out)


def test_generate_json_has_everything(mdm_command, models):
    code, out, err = mdm_command(
        *["generate", "ab", "--model", models / "student", "--gen-length", 8, "--json"],
        *["--steps", 4, "--block-length", 4, "--temperature", 0.7, "--remasking", "entropy"],
        *["--cfg-scale", 0.5, "--eos-last", "--seed", 3, "-n", 2],
    )
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert report["model"] == str(models / "student")
    assert report["request"] == {
        **{"prefix": "ab", "suffix": None, "length": 8, "chat": False, "stop": []}
    }
    assert report["settings"] == {
        **{"steps": 4, "block_length": 4, "temperature": 0.7, "remasking": "entropy"},
        **{"cfg_scale": 0.5, "suppress_eos": False, "eos_last": True, "stop_at_eos": True},
        **{"compat": "default", "top_p": 1.0, "threshold": None, "factor": None},
        **{"entropy_bound": None, "cache": "none", "refresh": None},
    }
    assert report["seed"] == 3
    assert report["seconds"] > 0
    assert len(report["generations"]) == 2
    for generation in report["generations"]:
        assert generation.keys() == {
            *{"text", "token_ids", "num_tokens", "finish_reason", "nfe", "confidence"}
        }
        assert generation["confidence"] is None  # entropy gives no probability
        assert len(generation["token_ids"]) == 8
        assert generation["finish_reason"] in ("stop", "length")
        assert generation["nfe"] <= 8


def test_the_number_type_is_a_choice(mdm_command, models):
    written = ["generate", "def f(", "--gen-length", 4, "--suppress-eos", "--json"]
    scored = ["score", "ab", "cdefgh", "--mc-samples", 7, "--json"]
    for words, model in ((written, "student"), (scored, "student"), (scored, "ar")):
        found = {}
        for dtype in ("float32", "bfloat16", None):
            chosen = [] if dtype is None else ["--dtype", dtype]
            code, out, err = mdm_command(*words, "--model", models / model, *chosen)
            assert code == 0, err
            found[dtype] = json.loads(out)
            assert found[dtype]["dtype"] == (dtype or "float32")
            found[dtype].pop("seconds", None)
        assert found[None] == found["float32"]
        assert found["bfloat16"] != {**found["float32"], "dtype": "bfloat16"}  # rounded
        code, _, err = mdm_command(*words, "--model", models / model, "--dtype", "bf16")
        assert code == 2
        assert "unknown dtype 'bf16'; did you mean" in err


RULES = [
    (["--threshold", 1e-6], {"threshold": 1e-6}),
    (["--factor", 50], {"factor": 50.0}),
    (["--entropy-bound", 99, "--remasking", "entropy"], {"entropy_bound": 99.0}),
]


@pytest.mark.parametrize(("rule", "setting"), RULES)
def test_a_rule_decides_how_many_tokens_a_forward_writes(mdm_command, models, rule, setting):
    options = ["--model", models / "student", "--gen-length", 6, "--suppress-eos", "--json"]
    code, out, err = mdm_command("generate", "ab", *options, *rule)
    assert code == 0, err
    report = json.loads(out)
    assert report["settings"].items() >= setting.items()
    assert report["generations"][0]["nfe"] == 1  # so lax that all six are kept together
    strict = ["--entropy-bound", 0, "--remasking", "entropy"]
    _, out, _ = mdm_command("generate", "ab", *options, *strict)
    assert json.loads(out)["generations"][0]["nfe"] == 6


def test_an_approximate_cache_is_a_setting(mdm_command, models, monkeypatch):
    seen = []

    def generate(denoiser, requests, settings, **more):
        seen.append((settings.cache, settings.refresh))
        return []

    monkeypatch.setattr("mdm.generate.generate", generate)
    options = ["--model", models / "student", "--json"]
    mdm_command("generate", "ab", *options)
    mdm_command("generate", "ab", *options, "--cache", "prefix")
    mdm_command("generate", "ab", *options, "--cache", "dual", "--refresh", 3)
    assert seen == [("none", None), ("prefix", None), ("dual", 3)]


def test_layers_in_8_bits_are_a_choice(mdm_command, models):
    written = ["generate", "def f(", "--gen-length", 4, "--suppress-eos", "--json"]
    scored = ["score", "ab", "cdefgh", "--mc-samples", 7, "--json"]
    for words, model in ((written, "student"), (scored, "student"), (scored, "ar")):
        found = {}
        for name in ("", "int8_dynamic"):
            chosen = ["--quantization", name] if name else []
            code, out, err = mdm_command(*words, "--model", models / model, *chosen)
            assert code == 0, err
            found[name] = json.loads(out)
            assert found[name].pop("quantization") == name
            found[name].pop("seconds", None)
        assert found[""] != found["int8_dynamic"]  # rounded
        for chosen, text in (
            (["--quantization", "int8_dynamics"], "did you mean 'int8_dynamic'?"),
            (["--quantization", "int8_dynamic", "--dtype", "bfloat16"], "got dtype=bfloat16"),
        ):
            # Before anything is loaded.
            code, out, err = mdm_command(*words, "--model", "nowhere", *chosen)
            assert (code, out) == (2, "")
            assert text in err


def test_help_tells_the_true_defaults(mdm_command):
    _, out, _ = mdm_command("convert", "--help")
    said = " ".join(out.split())
    assert "[default: SOURCE's, or 4]" in said
    assert "[default: mdlm, or as published]" in said
    _, out, _ = mdm_command("generate", "--help")
    assert "[default: all, or a block of the model]" in " ".join(out.split())


def test_generate_cuts_at_stop_strings(mdm_command, models):
    arguments = ["def f(", "--model", models / "student", "--gen-length", 6, "--suppress-eos"]
    _, out, _ = mdm_command("generate", *arguments, "--json")
    (whole,) = json.loads(out)["generations"]
    assert whole["finish_reason"] == "length"
    assert whole["confidence"] < 0
    stop = whole["text"][2]
    options = ["--stop", "never", "--stop", stop]
    _, out, _ = mdm_command("generate", *arguments, *options, "--json")
    assert json.loads(out)["request"]["stop"] == ["never", stop]
    (cut,) = json.loads(out)["generations"]
    assert cut["text"] == whole["text"].partition(stop)[0]
    assert cut["finish_reason"] == "stop"
    _, out, _ = mdm_command("generate", *arguments, *options)
    assert out == f"def f({cut['text']}\n"


def test_generate_from_the_nucleus(mdm_command, models):
    options = ["--model", models / "student", "--gen-length", 6, "--json"]
    _, greedy, _ = mdm_command("generate", "ab", *options)
    sampling = ["--temperature", 3, "--seed", 1]
    _, wild, _ = mdm_command("generate", "ab", *options, *sampling)
    _, tame, _ = mdm_command("generate", "ab", *options, *sampling, "--top-p", 1e-6)
    texts = [json.loads(out)["generations"][0]["text"] for out in (greedy, wild, tame)]
    assert texts[0] == texts[2] != texts[1]
    assert json.loads(tame)["settings"]["top_p"] == 1e-6


def test_generate_fills_a_hole(mdm_command, models):
    hole = ["--prefix", "def add(a):", "--suffix", "return total", "--span", 5]
    model = ["--model", models / "student"]
    _, out, _ = mdm_command("generate", *hole, *model)
    assert out.startswith("def add(a):")
    assert out.endswith("return total\n")
    _, out, _ = mdm_command("generate", *hole, *model, "--json")
    assert json.loads(out)["request"]["suffix"] == "return total"
    assert len(json.loads(out)["generations"][0]["token_ids"]) == 5


def test_generate_in_the_chat_template(mdm_command, models):
    options = ["--model", models / "student", "--gen-length", 2, "--json"]
    code, out, _ = mdm_command("generate", "hi", "--chat", *options)
    assert code == 0
    assert json.loads(out)["request"]["chat"] is True
    # The template alone is longer than what is left of a short context.
    code, _, err = mdm_command("generate", "h" * 50, "--chat", *options)
    assert code == 2
    assert "but the model was built for at most 64" in err
    assert mdm_command("generate", "h" * 50, *options)[0] == 0


def test_generate_as_the_published_sampler(mdm_command, models):
    options = ["--gen-length", 4, "--steps", 8, "--compat", "llada", "--json"]
    _, out, _ = mdm_command("generate", "a", "--model", models / "student", *options)
    assert json.loads(out)["generations"][0]["nfe"] == 8


def test_show_draws_every_step_on_stderr(mdm_command, models):
    options = ["--model", models / "student", "--gen-length", 3, "--suppress-eos", "--show"]
    _, out, err = mdm_command("generate", "ab", *options)
    assert out.startswith("ab")
    assert [f"step {step}, {left} open" in err for step, left in ((1, 2), (2, 1), (3, 0))] == [
        True
    ] * 3
    assert "░" in err
    _, out, _ = mdm_command("generate", "ab", *options, "--json")
    json.loads(out)  # nothing but the object on stdout


def test_without_a_model_the_last_finished_run_is_taken(mdm_command, models, tmp_path):
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    (tmp_path / "runs" / "demo" / "final").symlink_to(models / "student")
    code, out, err = mdm_command("generate", "ab", "--gen-length", 2, "--json")
    assert code == 0
    assert json.loads(out)["model"] == "runs/demo/final"
    assert err == "model: runs/demo/final (the last finished run)\n"


@pytest.mark.parametrize(
    ("arguments", "expected_code", "text"),
    [
        (["x"], 5, "mdm: no finished run in 'runs'; train one with `mdm train`"),
        (["x", "--model", "none"], 5, "mdm: no model folder at 'none'"),
        (["x", "--model", "{models}/ar"], 5, "has no mdm.json, so it is not an mdm model"),
        (["--model", "{student}"], 2, "mdm: give a PROMPT to continue, or --prefix"),
        (
            ["x", "--prefix", "a", "--span", "3"],
            2,
            "mdm: give either a PROMPT or --prefix/--suffix",
        ),
        (["--prefix", "a"], 2, "mdm: --suffix and --prefix need --span N"),
        (["--prefix", "a", "--span", "3", "--chat"], 2, "mdm: --chat needs a PROMPT"),
        (["x", "--gen-length", "0"], 2, "mdm: the number of tokens to fill must be >= 1; got 0"),
        (["x", "--steps", "0"], 2, "mdm: steps must be at least 1; got 0"),
        (["x", "--temperature", "-1"], 2, "mdm: temperature must be >= 0"),
        (["x", "--top-p", "0"], 2, "mdm: top_p must be in (0, 1] (1 = all tokens); got 0.0"),
        (["x", "--top-p", "0.5", "--compat", "llada"], 2, "mdm: the published sampler has no top"),
        (["x", "--stop", "", "--model", "{student}"], 2, "mdm: a stop string must not be empty"),
        (["x", "--remasking", "low_conf"], 2, "did you mean 'low_confidence'?"),
        (["x", "--compat", "lada"], 2, "did you mean 'llada'?"),
        (
            ["x", "--threshold", "0.9", "--factor", "1"],
            2,
            "mdm: threshold and factor are rules that exclude each other; give one",
        ),
        (["x", "--factor", "1", "--steps", "4"], 2, "mdm: factor decides how many steps there"),
        (["x", "--factor", "0"], 2, "mdm: factor must be > 0; got 0.0"),
        (["x", "--factor", "1", "--compat", "llada"], 2, "mdm: the published sampler has no fac"),
        (["x", "--entropy-bound", "-1"], 2, "mdm: entropy_bound must be >= 0; got -1.0"),
        (["x", "--entropy-bound", "inf"], 2, "mdm: entropy_bound must be >= 0; got inf"),
        (["x", "--entropy-bound", "0.1"], 2, "mdm: entropy_bound needs another confidence"),
        (["x", "--cache", "prefx"], 2, "did you mean 'prefix'?"),
        (["x", "--refresh", "2"], 2, "mdm: refresh=2 is for an approximate cache; choose cache="),
        (["x", "--refresh", "0", "--cache", "dual"], 2, "mdm: refresh must be at least 1; got 0"),
        (["x", "-n", "0", "--model", "{student}"], 2, "must be at least 1"),
        (["x", "--steps", "3.5"], 2, "is not a valid integer"),
        (
            [
                "x",
                "--gen-length",
                "8",
                "--block-length",
                "4",
                "--steps",
                "3",
                "--model",
                "{student}",
            ],
            2,
            "mdm: steps is 3, but there are 2 blocks of 4 tokens; make steps a multiple of 2",
        ),
        (["x", "--gen-length", "64", "--model", "{student}"], 2, "built for at most 64; shorten"),
        (["x", "--device", "tpu9", "--model", "{student}"], 2, "cannot use --device 'tpu9'"),
        (["x", "--device", "cuda:99", "--model", "{student}"], 2, "cannot use --device 'cuda:99'"),
    ],
)
def test_generate_refuses(mdm_command, models, arguments, expected_code, text):
    places = {"models": models, "student": models / "student"}
    code, out, err = mdm_command("generate", *(word.format(**places) for word in arguments))
    assert (code, out) == (expected_code, "")
    assert text in err
    assert "Traceback" not in err
    if err.startswith("mdm: "):
        assert err.count("\n") == 1  # one line


def test_a_place_that_cannot_be_written_is_one_line(mdm_command, models, tmp_path):
    (tmp_path / "file").write_text("")
    code, _, err = mdm_command("train", "--runs", tmp_path / "file", "--recipe", "ce")
    assert code == 5
    assert err.startswith("mdm: ")
    assert err.count("\n") == 1
    code, _, err = mdm_command(
        "data", "functions", "stdlib", "--limit", 1, "--output", tmp_path / "file" / "x.jsonl"
    )
    assert code == 3
    assert "cannot write" in err


def test_any_text_is_a_run_name(mdm_command):
    code, out, _ = mdm_command("train", "--recipe", "ce", "--name", "2026", "--settings")
    assert (code, "student" in out) == (0, True)
    from mdm.errors import ConfigError
    from mdm.train.recipe import named, read_recipe

    assert named(read_recipe("ce"), "2026-11-21").name == "2026-11-21"
    with pytest.raises(ConfigError, match="plain folder name"):
        named(read_recipe("ce"), "a/b")
