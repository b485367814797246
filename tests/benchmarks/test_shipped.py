"""How a calibrated preset becomes one that ships."""

import jax.numpy as jnp

from benchmarks import shipped
from qs_jax import presets, testing
from qs_jax.calibration.search import result_files
from qs_jax.files import read_json, write_json
from qs_jax.mechanisms.kv_maps import KVMaps


def test_the_preset_its_maps_and_its_search_are_kept(tmp_path, monkeypatch):
    model = testing.tiny_model()
    found, kept = tmp_path / "mine.json", tmp_path / "shipped" / "preset.json"
    kept.parent.mkdir()
    monkeypatch.setattr(shipped, "FILE", file := tmp_path / "calibration.json")
    monkeypatch.setattr(presets, "SHIPPED", {**presets.SHIPPED, "mine": kept})
    _, searched, maps = result_files(found)
    entry = {"ppl_increase": 0.1, "upper_bound": 0.15, "within_budget": True, "agreement": 0.9}
    entry |= {"kv_bytes_saved": 0.5, "exact_flops_saved": 0.1, "measured_time_saved": 0.1}
    entry |= {"prompt_exact_flops_saved": 0.2, "retrieval": {"lost": 0, "prompts": 8}}
    preset = {"provenance": {"verified": {"lengths": {"64": entry}}}}
    write_json(searched, {"preset": preset, "verified": [entry]})
    write_json(file, {"presets": {"balanced": {"preset": preset, "verified": []}}})
    presets.save(found, presets.balanced(model), model)
    shape = (model.num_layers, 1, model.hidden_size + 1, 2 * model.kv_size)
    KVMaps(jnp.full(shape, 0.1), layers=(1,), features=("state",)).save(maps)

    shipped.main(["mine", str(found), "python -m qs_jax calibrate"])
    assert presets.load(kept, model) == presets.balanced(model)
    read = KVMaps.load(presets.maps_path(kept))
    assert read.maps_LXFO[-1, 0, 0, 0] == jnp.float32(jnp.float16(0.1))
    content = read_json(file)["presets"]
    assert content["mine"]["command"] == "python -m qs_jax calibrate"
    assert list(content) == ["balanced", "mine"]
    table = shipped.tables(read_json(file))["calibrated mine"]
    assert "| 512 | 32 | +0.10 | +0.15 | 90.0% | 0 | 20.0% | 50.0% | yes |" in table
