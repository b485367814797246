"""Passkeys: the prompts, what is found, the pairs of outcomes, and `evaluate --passkeys`."""

import json
import math
import types

import numpy as np
import pytest
from tokenizers import processors

import qs_jax
from qs_jax import cli, presets
from qs_jax.errors import InputError
from qs_jax.evaluation import passkey
from qs_jax.testing import toy_tokenizer
from tests.evaluation.settings import quota

pytestmark = pytest.mark.xdist_group("evaluate")
OPENING, NEEDLE = 34, 36  # characters, which are the toy tokenizer's tokens


@pytest.fixture
def tokenizer():
    return toy_tokenizer()


@pytest.mark.parametrize("length", [128, 500, 2048])
def test_prompts_have_their_length_and_hide_their_key_at_its_depth(tokenizer, length):
    depths = (0.0, 0.25, 1.0)
    prompts = passkey.make_passkeys(tokenizer, [length], count=7, depths=depths)
    for number, prompt in enumerate(prompts):
        text = tokenizer.decode(prompt.ids)
        assert (prompt.length, len(text) + passkey.ANSWER_TOKENS) == (length, length)
        assert text.count(prompt.key) == 1
        opening, question = text[:OPENING], text[text.rindex(" What") :]
        filler = len(text) - len(opening) - NEEDLE - len(question)
        before = text.index(f" The pass key is {prompt.key}. Remember it.")
        assert text[before - 1] == ".", "between sentences"
        assert abs(before - OPENING - depths[number % 3] * filler) < 50, "a sentence"
        assert question == " What is the pass key? The pass key is"


def test_prompts_differ_and_depend_on_the_seed_alone(tokenizer):
    def make(seed):
        return passkey.make_passkeys(tokenizer, (200, 300), count=8, seed=seed)

    prompts = make(5)
    assert prompts == make(5)
    assert [prompt.length for prompt in prompts] == [200] * 8 + [300] * 8
    assert len({prompt.key for prompt in prompts + make(6)}) > 28
    assert len({prompt.ids[OPENING:60] for prompt in prompts}) > 8
    with pytest.raises(InputError, match="needs at least 116 tokens, got a length of 99"):
        passkey.make_passkeys(tokenizer, [200, 99])
    with pytest.raises(InputError, match="drops digits or letters"):
        passkey.make_passkeys(toy_tokenizer(vocab_size=18), [200])


def test_a_beginning_token_is_part_of_the_length(tokenizer):
    template = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.backend_tokenizer.post_processor = template
    (prompt,) = passkey.make_passkeys(tokenizer, [200], count=1)
    assert (prompt.ids[0], prompt.ids.count(0), prompt.length) == (0, 1, 200)


@pytest.mark.hf
@pytest.mark.slow
def test_a_key_is_found_where_the_greedy_text_holds_it(tiny_checkpoint):
    """Keys are pieces of what `transformers` generates, or of what it does not."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    hf = AutoModelForCausalLM.from_pretrained(tiny_checkpoint.parent / "hf").eval()
    params, model = qs_jax.load(tiny_checkpoint)
    tokenizer, rng = qs_jax.load_tokenizer(tiny_checkpoint), np.random.default_rng(0)
    prompts, options = [], {"max_new_tokens": passkey.ANSWER_TOKENS, "pad_token_id": 1}
    for width in (19, 20):
        ids = rng.integers(2, 97, width).tolist()
        out = hf.generate(torch.tensor([ids]), do_sample=False, **options)
        text = tokenizer.decode(out[0, width:])
        prompts += [passkey.Passkey(tuple(ids), key, 0.5) for key in (text[2:6], text + "?")]
    cfg = qs_jax.Config(model, temperature=1.0, max_new_tokens=3)
    found = passkey.find_passkeys(params, cfg, tokenizer, prompts[::-1], batch_size=2)
    assert found.tolist() == [False, True] * 2


@pytest.mark.parametrize(("lost", "won"), [(0, 0), (1, 0), (3, 3), (8, 1), (0, 12)])
def test_pairs_of_outcomes(lost, won):
    """The p-value is the tail of a fair coin, doubled."""
    cells = {"both": 5, "only_dense": lost, "only_preset": won, "neither": 2}
    lengths = [100] * 4 + [200] * (3 + lost + won)
    prompts = [passkey.Passkey((2,) * (n - passkey.ANSWER_TOKENS), "", 0.5) for n in lengths]
    dense = np.repeat([True, True, False, False], [*cells.values()])
    preset = np.repeat([True, False, True, False], [*cells.values()])
    found = passkey.Comparison(tuple(prompts), dense, preset)
    counts = json.loads(json.dumps(found.to_dict()))
    assert {name: counts[name] for name in cells} == cells
    tail = sum(math.comb(lost + won, k) for k in range(min(lost, won) + 1)) / 2 ** (lost + won)
    assert counts["mcnemar_p"] == pytest.approx(min(1, 2 * tail))
    assert found.lost == {100: 0, 200: lost}
    assert (counts["prompts"], counts["by_length"]["100"]["both"]) == (7 + lost + won, 4)
    assert [row["preset"] for row in counts["rows"]] == preset.tolist()


@pytest.mark.parametrize("preset", ["off", "mine.json"])
def test_beside_perplexity(tiny_checkpoint, tmp_path, monkeypatch, capsys, preset):
    """A model that always answers, but for every fourth prompt of the preset."""
    asked = []

    def answer(params, rows, cfg, devices):
        asked.append((bool(cfg.quicksilver), cfg.engine, {len(row) for row in rows}))
        texts = [tokenizer.decode(row) for row in rows]
        keys = [text[text.rindex("key is ") + 7 :][:5] for text in texts]
        if cfg.quicksilver and not cfg.quicksilver.is_off:
            keys[3::4] = ["12"] * len(keys[3::4])
        tokens = np.array([tokenizer(f" {key:<5}.").input_ids for key in keys])
        return types.SimpleNamespace(tokens=tokens, lengths=np.full(len(rows), 7))

    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("one two three four five six " * 10)
    tokenizer = qs_jax.load_tokenizer(tiny_checkpoint)
    presets.save(tmp_path / "mine.json", quota())
    monkeypatch.setattr(passkey, "generate", answer)
    command = ["evaluate", "--ckpt", str(tiny_checkpoint), "--data", "text.txt", "--out", "out"]
    command += ["--seq-len", "125", "--continuation-tokens", "9", "--preset", preset]
    assert cli.main([*command, "--passkeys", "10", "--batch-size", "4"]) == 0
    results, lost = json.loads((tmp_path / "out").read_text()), 2 * (preset != "off")
    found, shown = results["passkeys"], capsys.readouterr().out
    assert (found["prompts"], found["both"], found["only_dense"]) == (10, 10 - lost, lost)
    assert {row["length"] for row in found["rows"]} == {125}
    assert (results["config"]["passkeys"], results["windows"]) == (10, 2)
    assert f"10 dense, {10 - lost} preset" in shown
    assert len(asked) == (6 if lost else 3)
    assert {engine for _, engine, _ in asked} == {"auto"}
    assert cli.main([*command, "--passkeys", "1", "--seq-len", "99", "--overwrite"]) == 1
    assert "a passkey needs at least 116 tokens, got a length of 99" in capsys.readouterr().err
