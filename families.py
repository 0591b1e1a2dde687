"""The families of published models: what their config.json says, and what it means here.

    sizes      hidden_size, num_hidden_layers, …           <->  model.ModelConfig
    layers     Llama, Qwen2 (biases), Qwen3 (q and k norms)
    objective  ar, bidirectional or block; shift; K         ->  diffusion.Recipe

To add a family whose layers are one of these three, add a row to MODEL_TYPES.

Not covered: scaled RoPE, quantized weights, biases beyond Qwen2's.
"""
from dataclasses import fields

from configurator import Mistake, check_type, shortened
from diffusion import Recipe
from model import ModelConfig

# our name for a size -> Hugging Face's
HF_NAMES = {
    "vocab_size": "vocab_size", "d_model": "hidden_size", "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads", "n_kv_head": "num_key_value_heads", "head_dim": "head_dim",
    "d_ff": "intermediate_size", "context": "max_position_embeddings", "norm_eps": "rms_norm_eps",
    "rope_theta": "rope_theta", "tie_embeddings": "tie_word_embeddings"}
ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM",
                 "qwen3": "Qwen3ForCausalLM"}
# architecture or model_type in a config.json -> (whose layers it has, objective, shift, block_size)
# What config.json says under these names, as our own folders do, and what the user says come first.
MODEL_TYPES = {
    "StableDiffcoderForCausalLM": ("llama", "block", False, 4),  # its model_type is llama
    "SeedDiffcoderForCausalLM": ("llama", "block", False, 4),  # what its first edition calls itself
    "llama": ("llama", "ar", True, 1),  # Seed-Coder
    "qwen2": ("qwen2", "ar", True, 1),  # Qwen2.5-Coder
    "qwen3": ("qwen3", "ar", True, 1),
    "Dream": ("qwen2", "bidirectional", True, 1),  # Dream, DiffuCoder
    "CoDA": ("qwen3", "bidirectional", True, 1),
    "sdar": ("qwen3", "block", False, None),  # published with several block sizes
}
# what a folder says of its objective, or the user in its place
ASKED = {f.name: f.type for f in fields(Recipe) if f.name in ("objective", "shift", "block_size")}


def to_hf_config(cfg, tok, recipe, dtype):
    """config.json of a model, as a dict: Hugging Face's keys, and ours for the objective."""
    model_type = "llama"
    if cfg.qkv_bias:
        model_type = "qwen2"
    if cfg.qk_norm:
        model_type = "qwen3"
    hf = {"architectures": [ARCHITECTURES[model_type]], "model_type": model_type}
    for ours, theirs in HF_NAMES.items():
        hf[theirs] = getattr(cfg, ours)
    return hf | {
        "rope_parameters": {"rope_type": "default", "rope_theta": cfg.rope_theta},  # transformers 5
        "hidden_act": "silu", "initializer_range": 0.02,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "bos_token_id": tok.bos_id, "eos_token_id": tok.eos_id,
        "pad_token_id": tok.pad_id, "mask_token_id": tok.mask_id,
        "objective": recipe.objective, "shift": recipe.shift, "block_size": recipe.block_size}


def family_of(hf):
    """The row of MODEL_TYPES of a config.json (a dict). Raises Mistake for an unknown family.

    The class that the folder brings itself decides, then `architectures`, then `model_type`.
    """
    architectures, auto_map = hf.get("architectures") or [], hf.get("auto_map") or {}
    if not isinstance(architectures, list):
        raise Mistake(f"architectures={shortened(architectures)} in config.json is not a list")
    if not isinstance(auto_map, dict):
        raise Mistake(f"auto_map={shortened(auto_map)} in config.json is not an object")
    own_classes = [str(reference).rpartition(".")[2] for reference in auto_map.values()]
    for name in (*own_classes, *architectures, hf.get("model_type")):
        if isinstance(name, str) and name in MODEL_TYPES:
            return MODEL_TYPES[name]
    raise Mistake(f"model_type={shortened(hf.get('model_type'))} in config.json is not one of "
                  f"{', '.join(MODEL_TYPES)}")


def from_hf_config(hf):
    """The ModelConfig that a config.json (a dict) describes. Raises Mistake for what we lack."""
    layout = family_of(hf)[0]
    hf = {key: value for key, value in hf.items() if value is not None}
    hf["rope_theta"] = rope_theta_of(hf)
    supported = {"hidden_act": "silu", "use_sliding_window": False, "mlp_bias": False,
                 "attention_bias": layout == "qwen2"}
    for key, allowed in supported.items():
        if hf.get(key, allowed) != allowed:
            raise Mistake(f"{key}={shortened(hf[key])} in config.json is not supported: "
                          f"only {allowed!r} is")
    if "quantization_config" in hf:
        raise Mistake("quantization_config in config.json is not supported: quantized weights are "
                      "not read")
    kinds = {f.name: f.type for f in fields(ModelConfig)}
    heads = hf.get("num_attention_heads")
    if "head_dim" not in hf and heads is not None:
        width = check_type("hidden_size", hf.get("hidden_size"), kinds["d_model"])
        hf["head_dim"] = width // check_type("num_attention_heads", heads, kinds["n_head"])
    hf.setdefault("num_key_value_heads", heads)
    missing = [name for name in HF_NAMES.values() if hf.get(name) is None]
    if missing:
        raise Mistake(f"config.json does not say {', '.join(missing)}")
    sizes = {}
    for ours, theirs in HF_NAMES.items():
        sizes[ours] = check_type(f"config.json's {theirs}", hf[theirs], kinds[ours])
    return ModelConfig(**sizes, qkv_bias=layout == "qwen2", qk_norm=layout == "qwen3")


def rope_theta_of(hf):
    """The base of the rotary embedding, where config.json has put it over the years."""
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise Mistake(f"rope_parameters={shortened(rope)} in config.json is not an object")
    kind = rope.get("rope_type", rope.get("type", "default"))  # "type" before transformers 4.43
    if kind != "default":
        raise Mistake(f"rope_type={shortened(kind)} in config.json is not supported: "
                      "only 'default' is")
    return rope.get("rope_theta", hf.get("rope_theta", 1e4))


def unsaid(objective):
    """What is known of an objective that its folder was not trained for."""
    return {"shift": None, "block_size": None if objective == "block" else 1}


def recipe_of(hf, tok, objective=None, shift=None, block_size=None):
    """The Recipe of a folder: as asked for, else as its config.json says, else by its model_type.

    hf: config.json's dict. Another objective than the folder's takes nothing else from it.
    Raises Mistake for what nobody says and for values that do not fit.
    """
    told = dict(zip(ASKED, family_of(hf)[1:]))
    if hf.get("objective") not in (None, told["objective"]):
        told = unsaid(hf["objective"])  # the rest is of the family's objective
    for key, kind in ASKED.items():
        if hf.get(key) is not None:
            told[key] = check_type(f"config.json's {key}", hf[key], kind)
    if objective not in (None, told["objective"]):
        told = unsaid(objective)
    for key, value in (("objective", objective), ("shift", shift), ("block_size", block_size)):
        if value is not None:
            told[key] = check_type(key, value, ASKED[key])
    if told["block_size"] is None:
        raise Mistake("objective='block' needs a block_size, which config.json does not say: "
                      "give --block_size, such as 4")
    if told["objective"] != "ar" and tok.mask_id is None:
        raise Mistake(f"objective={told['objective']!r} needs a mask token, and the tokenizer in "
                      f"{tok.folder} names none: say which with --mask_token")
    return Recipe(**told, mask_id=tok.mask_id)
