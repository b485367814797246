"""A halting score and a KV policy of the user's own: the same laws, and the same accounts."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qs_jax
from examples.key_norm import key_norm
from qs_jax import accounting, cli, presets, report
from qs_jax.accounting import flops
from qs_jax.config import Config, HaltingConfig, KVSkipConfig
from qs_jax.errors import ConfigError
from qs_jax.mechanisms import custom
from qs_jax.models import embed
from qs_jax.models.layers import rms_normalised
from qs_jax.testing import check_laws, tiny_model, tiny_params
from tests.engine.contract import settings
from tests.support import random_tokens

MODEL = tiny_model(num_layers=6, dtype="float64")
PROMPTS = (30, 24)


def quota(score="attention", policy="skip", layers=(2, 4), shares=(0.4, 0.8), **fields):
    rule = HaltingConfig(rule="quota", layers=layers, quota=shares, score=score, **fields)
    return settings(halting=rule, kv_skip=KVSkipConfig(policy))


def received(signals):
    return signals.received_BT


def unlike_the_mean(signals):
    """Of all ranked tokens, in any order, as KeyDiff ranks keys (Park et al. 2025)."""
    keys = jnp.where(signals.ready_BT[..., None, None], signals.keys_BTKH, 0)
    return -(keys * keys.mean(1, keepdims=True)).sum((-1, -2))


def of_its_own(signals):
    moved = jnp.abs(signals.after_BTD - signals.before_BTD).max(-1)
    return moved * signals.entropy_BT + signals.values_BTKH.mean((-1, -2)) + signals.drift_BT


@dataclasses.dataclass(frozen=True)
class Projected:
    """What "propagate" does."""

    def keys_values(self, frozen, layer):
        return frozen.project()


@dataclasses.dataclass(frozen=True)
class Mixed:
    """Reads everything there is to read."""

    share: float = 0.5

    def keys_values(self, frozen, layer):
        k, v = frozen.project()
        read = frozen.previous_BTD + frozen.embedded_BTD + frozen.h_BTD
        read = read[..., :1, None] + (frozen.pos_BT + frozen.depth_BT + layer)[..., None, None]
        return k * self.share + read, v - read


def score_both(qs):
    with jax.enable_x64(True):
        rows = random_tokens(MODEL, 2, 36)
        return [
            qs_jax.score(
                tiny_params(MODEL), rows, Config(MODEL, qs, engine=engine), prompt_lengths=PROMPTS
            )
            for engine in ("masked", "compact")
        ]


def test_the_built_in_ones_written_by_hand_are_the_same():
    """Decisions, numbers, and what the account charges, on both engines."""
    both = (quota(received, Projected()), quota("attention", "propagate"))
    for ours, theirs in zip(*map(score_both, both), strict=True):
        np.testing.assert_array_equal(ours.record.depth, theirs.record.depth)
        np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=1e-6)
        records = (ours.record, theirs.record)
        one, other = (accounting.tally(r, MODEL, qs) for r, qs in zip(records, both, strict=True))
        assert one == other
    given = {"max_new_tokens": 3, "eos_token_ids": (), "engine": "compact"}
    with jax.enable_x64(True):
        params, rows = tiny_params(MODEL), random_tokens(MODEL, 2, 30)
        ours, theirs = (qs_jax.generate(params, rows, Config(MODEL, qs, **given)) for qs in both)
    np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=1e-6)


def test_the_tokens_whose_keys_have_the_highest_norm_stop_first():
    """After the first layer, whose keys are a product of the embeddings alone."""
    masked, compact = score_both(quota(key_norm, layers=(1,), shares=(0.5,)))
    with jax.enable_x64(True):
        params, rows = tiny_params(MODEL), random_tokens(MODEL, 2, 36)
        block = jax.tree.map(lambda leaf: np.asarray(leaf[0]), params["layers"])
        embedded = embed(params, jnp.asarray(rows), jnp.zeros(rows.shape, jnp.int32), MODEL)
        x = np.asarray(rms_normalised(embedded)) * block["attn_norm"]["scale"]
        keys = np.split(
            x @ block["qkv"]["kernel"], [MODEL.q_size, MODEL.q_size + MODEL.kv_size], -1
        )
    norms = np.linalg.norm(keys[1].reshape(2, 36, 2, 8), axis=-1).mean(-1)
    for row, prompt in enumerate(PROMPTS):
        may = np.arange(1, prompt - 3)  # one sink and three recent tokens are exempt
        highest = may[np.argsort(-norms[row, may])[: len(may) // 2]]
        for out in (masked, compact):
            assert set(np.flatnonzero(out.record.depth[row, :prompt] == 1)) == set(highest)


def test_a_score_is_charged_what_it_computes():
    """2 heads of 8 channels: squares, sums and roots, their mean, and the sign."""
    count = flops.score_flops(key_norm, MODEL, 64)
    assert 2 * (8 + 7 + 1) <= count <= 2 * (8 + 8 + 1) + 4
    assert flops.score_flops(received, MODEL, 64) == 0
    assert flops.policy_flops(Projected(), MODEL) == flops.keys_values_flops(MODEL)
    assert custom.reads(of_its_own, MODEL) == {
        *("before_BTD", "after_BTD", "entropy_BT", "values_BTKH", "drift_BT")
    }
    assert custom.reads(jax.jit(key_norm), MODEL) == {"keys_BTKH"}, "calls are looked into"


@pytest.mark.parametrize("score", [lambda signals: signals.drift_BT, jax.jit(key_norm)])
def test_what_json_cannot_hold_is_not_read_back_as_another(score):
    """It is named, and refused where it is read."""
    fields = HaltingConfig(rule="quota", layers=(1,), quota=(0.5,), score=score).to_dict()
    assert isinstance(fields["score"], str)
    with pytest.raises(ConfigError, match=r"halting\.score must be"):
        HaltingConfig.from_dict(fields)


def test_a_score_and_a_policy_hold_the_laws():
    check_laws(quota(of_its_own, Mixed(), entropy="latent"))


@pytest.mark.slow
@pytest.mark.parametrize("score", [key_norm, unlike_the_mean, "random"])
def test_scores_hold_the_laws(score):
    check_laws(quota(score))


@pytest.mark.slow
def test_new_tokens_hold_the_laws():
    """Teacher-forced, on the masked engine; and the dual rule."""
    rule = HaltingConfig(drift="relative", tau_drift=0.6, entropy=None, layers=(2, 3))
    check_laws(settings(halting=rule, kv_skip=KVSkipConfig(Mixed())))
    model = tiny_model(num_layers=6)
    cfg = Config(model, settings(halting=rule, kv_skip=KVSkipConfig(Mixed())), max_new_tokens=2)
    assert qs_jax.generate(tiny_params(model), random_tokens(model, 1, 9), cfg).record.simulated
    with pytest.raises(qs_jax.ConfigError, match="fills in prompts"):
        qs_jax.generate(tiny_params(model), [[3, 4]], cfg.replace(engine="compact"))


def of_the_next(signals):
    return jnp.roll(key_norm(signals), -1, axis=1)


def of_the_rest(signals):
    """The mean over the prompt's later tokens."""
    own = jnp.where(signals.ready_BT, jnp.linalg.norm(signals.after_BTD, axis=-1), 0)
    return jnp.cumsum(own[:, ::-1], axis=1)[:, ::-1] / (signals.pos_BT.shape[1] - signals.pos_BT)


def of_the_row(signals):
    return key_norm(signals) - key_norm(signals).mean(1, keepdims=True) * signals.pos_BT


def of_the_batch(signals):
    return signals.drift_BT - signals.drift_BT.max(0, keepdims=True)


def from_the_end(signals):
    return 1.0 * (signals.pos_BT.max(1, keepdims=True) - signals.pos_BT)


@pytest.mark.parametrize(
    "score", [of_the_next, of_the_rest, of_the_row, of_the_batch, from_the_end]
)
def test_a_score_that_looks_ahead_is_caught(score):
    with pytest.raises(AssertionError, match=f"causality: halting.score .*{score.__name__}"):
        check_laws(quota(score))


class Shifted:
    def keys_values(self, frozen, layer):
        k, v = frozen.project()
        return k, jnp.roll(v, 1, axis=1)


def test_a_policy_that_looks_at_other_tokens_is_caught():
    with pytest.raises(AssertionError, match=r"kv_skip.policy .*Shifted reads other tokens"):
        check_laws(quota(policy=Shifted()))


class Wide:
    def keys_values(self, frozen, layer):
        return frozen.h_BTD, frozen.h_BTD


WRONG = {
    "gives .*, not one": quota(lambda signals: signals.keys_BTKH),
    "is no pure JAX": quota(lambda signals: float(signals.layer) * signals.pos_BT),
    "name its estimator": quota(of_its_own, entropy=None),
    "expected k and v": quota(
        policy=type("P", (), {"keys_values": lambda *_: (_[1].h_BTD,) * 2})()
    ),
}


@pytest.mark.parametrize("reason", WRONG)
def test_what_is_no_score_or_policy_is_refused(reason):
    with pytest.raises(qs_jax.ConfigError, match=reason):
        score_both(WRONG[reason])


def test_settings_that_do_not_fit_are_refused():
    for reason, make in {
        "must be a function": lambda: quota((1, 2)),
        "must be 'attention', 'drift'": lambda: quota("attenion"),
        "cannot be imported": lambda: quota("examples.key_norm:no_such"),
        "no method keys_values": lambda: quota(policy=key_norm),
        "works by layer": lambda: settings(
            halting=HaltingConfig(), kv_skip=KVSkipConfig(Projected())
        ),
    }.items():
        with pytest.raises(qs_jax.ConfigError, match=reason):
            make()


def test_a_preset_file_names_what_it_imports(tmp_path):
    model, qs = tiny_model(num_layers=6), quota(key_norm, Mixed())
    path = presets.save(tmp_path / "own.json", qs)
    stored = json.loads(path.read_text())["quicksilver"]
    assert stored["halting"]["score"] == "examples.key_norm:key_norm"
    assert presets.load(path, model) == qs
    for lost in (quota(lambda signals: signals.drift_BT), quota(policy=Mixed(share=0.1))):
        with pytest.raises(qs_jax.ConfigError):
            presets.save(tmp_path / "lost.json", lost)


def test_a_search_ranks_by_a_score_and_tries_a_policy():
    model = tiny_model(num_layers=6)
    given = {"max_ppl_increase": 1e6, "max_evaluations": 2, "candidates": 1, "timed_runs": 0}
    given |= {"policies": (Projected(),), "score": key_norm, "layers": (2,), "fusion": False}
    cfg = Config(model, continuation_tokens=12)
    text = random_tokens(model, 6, 60)
    found = qs_jax.calibration.search(tiny_params(model), text, cfg, **given)
    assert (found.preset.halting.score, found.preset.kv_skip.policy) == (key_norm, Projected())
    assert found.to_dict()["front"][0]["family"].endswith(":Projected")
    cfg = cfg.replace(protocol="teacher-forced")
    with pytest.raises(qs_jax.ConfigError, match="a score is of quotas"):
        qs_jax.calibration.search(tiny_params(model), text, cfg, **given)


def test_a_report_shows_the_score_by_its_name():
    model = tiny_model(num_layers=6)
    cfg = Config(model, quota(key_norm), continuation_tokens=6)
    ids = random_tokens(model, 1, 36)[0]
    runs = list(report.trace(tiny_params(model), ids, cfg, all_combinations=False))
    whole = report.PresetRuns("own", cfg, runs)
    page = report.to_json(report.Report("t", {}, report.TextRuns(ids, list("x" * 36), [whole])))
    assert page["text"]["presets"][0]["signals"]["own"] == "score examples.key_norm:key_norm"
    shown = runs[-1].signals["own"][1]
    halted, kept = (runs[-1].record.depth[0] == 2), (runs[-1].record.depth[0] > 2)
    may = np.isfinite(shown) & (np.arange(36) >= 1) & (np.arange(36) < 27)
    assert shown[halted].max() <= shown[kept & may].min()


def test_a_preset_file_with_a_score_is_evaluated(tiny_checkpoint, tmp_path):
    preset = presets.save(tmp_path / "own.json", quota(key_norm, layers=(1,), shares=(0.5,)))
    (tmp_path / "text.txt").write_text("the quick brown fox " * 200)
    command = ["evaluate", "--ckpt", str(tiny_checkpoint), "--preset", str(preset)]
    command += ["--data", str(tmp_path / "text.txt"), "--seq-len", "40", "--limit-windows", "2"]
    command += ["--continuation-tokens", "8", "--out", str(tmp_path / "out.json")]
    assert cli.main(command) in (None, 0)
    config = json.loads((tmp_path / "out.json").read_text())
    assert "examples.key_norm:key_norm" in json.dumps(config)
