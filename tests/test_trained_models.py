"""Small models that were really trained do what they were trained to do."""

import json
import struct

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import qs_jax
from convert.hf_to_flax import convert
from qs_jax import cli
from tests.convert.gguf_files import write_gguf


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


def read_stories(path):
    """llama2.c's legacy format as a Hugging Face config and tensors."""
    raw = path.read_bytes()
    dim, hidden, layers, heads, kv_heads, vocab, context = struct.unpack("<7i", raw[:28])
    flat, used = np.frombuffer(raw, "<f4", offset=28), 0

    def take(*shape):
        nonlocal used
        size = int(np.prod(shape))
        used += size
        return flat[used - size : used].reshape(shape)

    kv = dim // heads * kv_heads
    tensors = {"model.embed_tokens.weight": take(vocab, dim)}
    stacked = {
        "input_layernorm": (dim,),
        "self_attn.q_proj": (dim, dim),
        "self_attn.k_proj": (kv, dim),
        "self_attn.v_proj": (kv, dim),
        "self_attn.o_proj": (dim, dim),
        "post_attention_layernorm": (dim,),
        "mlp.gate_proj": (hidden, dim),
        "mlp.down_proj": (dim, hidden),
        "mlp.up_proj": (hidden, dim),
    }
    for name, shape in stacked.items():
        for layer, tensor in enumerate(take(layers, *shape)):
            tensors[f"model.layers.{layer}.{name}.weight"] = tensor
    tensors["model.norm.weight"] = take(dim)
    config = {
        "hidden_size": dim,
        "intermediate_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": context,
        "rms_norm_eps": 1e-5,
    }
    return config, tensors, vocab


def read_pieces(path, count):
    """llama2.c's tokenizer file as GGUF metadata."""
    raw, at, tokens, scores = path.read_bytes(), 4, [], []
    for _ in range(count):
        score, length = struct.unpack_from("<fi", raw, at)
        tokens.append(raw[at + 8 : at + 8 + length].decode().replace(" ", "▁"))
        scores.append(score)
        at += 8 + length
    tokens[:3] = ["<unk>", "<s>", "</s>"]
    kinds = [2, 3, 3] + [6] * 256 + [1] * (count - 259)
    special = {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}
    return {"model": "llama", "tokens": tokens, "scores": scores, "token_type": kinds} | special


def test_stories260k_as_gguf_with_its_tokenizer(research_data, tmp_path, capsys):
    """llama2.c interleaves rotary pairs as GGUF does, so its rows go into the file as they are."""
    pytest.importorskip("gguf")
    folder = research_data / "models" / "stories260K"
    config, tensors, vocab = read_stories(folder / "stories260K.bin")
    pieces = read_pieces(folder / "tok512.bin", vocab)
    path = write_gguf(tmp_path / "m.gguf", tensors, config, permute=False, tokenizer=pieces)
    convert(str(path), tmp_path / "ckpt")
    beginning = "Once upon a time, there was a little girl"
    prompt = qs_jax.load_tokenizer(tmp_path / "ckpt")(beginning).input_ids
    assert prompt[0] == 1
    assert len(prompt) < 25, "whole pieces, not single bytes"
    command = ["generate", "--ckpt", str(tmp_path / "ckpt"), "--prompt", beginning]
    assert cli.main([*command, "--max-new-tokens", "60"]) == 0
    story = f"{beginning} named Lily. She loved to play outside in the park. One day, she saw"
    assert capsys.readouterr().out.startswith(f"{story} a big, red ball.")
