"""A small model that was really trained does what it was trained to do (GPT-2; Llama: embedded)."""

import json

import numpy as np
from safetensors.numpy import load_file, save_file

import qs_jax
from convert.hf_to_flax import convert


def test_slm4096_has_memorised_its_corpus(research_data, tmp_path):
    """GPT-2 architecture; 0.070 nats a character on its corpus, where uniform is 3.99."""
    source = research_data / "models" / "slm4096"
    sizes = json.loads((source / "config.json").read_text())
    tensors = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        name = name.replace("blocks.", "h.").replace("tok_emb", "wte").replace("pos_emb", "wpe")
        # Its linear weights are stored (out, in).
        linear = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
        tensors[name] = np.ascontiguousarray(tensor.T) if linear else tensor
    save_file(tensors, tmp_path / "model.safetensors")
    config = {"model_type": "gpt2", "activation_function": "gelu"}
    config |= {name: sizes[name] for name in ("vocab_size", "n_embd", "n_layer", "n_head")}
    config |= {"n_positions": sizes["block_size"], "layer_norm_epsilon": sizes["layer_norm_eps"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model, _ = convert(str(tmp_path), tmp_path / "ckpt", tokenizer=False)
    params, _ = qs_jax.load(tmp_path / "ckpt")
    index = {character: number for number, character in enumerate(sizes["vocab"])}
    text = (source / "corpus.txt").read_text()
    ids = np.array([index[character] for character in text])
    cfg = qs_jax.Config(model=model, max_new_tokens=48)
    windows = ids[: len(ids) // 128 * 128].reshape(-1, 128)
    scores = qs_jax.score(params, windows, cfg)
    assert 0.05 < scores.nll < 0.09, "the README measured 0.070"
    out = qs_jax.generate(params, ids[None, :64], cfg)
    continuation = "".join(sizes["vocab"][token] for token in out.tokens[0])
    assert continuation == text[64:112]
