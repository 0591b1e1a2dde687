"""Our logits compared with those of the folder's own code, which `transformers` runs.

    python huggingface.py verify FOLDER
    python huggingface.py verify apple/DiffuCoder-7B-Base --trust_remote_code=true

A folder that brings code of its own is only run when asked to. Other people's code fails in many
ways, most often because it was written for another version of transformers: any exception is
reported in one line, with the version to try.

Not covered: caches, generation, anything but one forward pass.
"""
import re

import torch

from configurator import Mistake, out_of_memory
from files import read_json
from huggingface import find, opened, weight_files
from spans import Spans

OWN_CLASSES = ("AutoConfig", "AutoModel", "AutoModelForCausalLM")  # of auto_map, those verify loads
LIMITS = {"float32": 1e-4, "bfloat16": 0.1}  # largest difference of two logits / largest logit


def own_classes(hf):
    """{transformers' class: the class that replaces it} of a config.json with code of its own.

    A class is "modeling_dream.DreamModel", or "owner/repo--modeling_dream.DreamModel" where the
    code is another folder's on the Hub.
    """
    auto_map = hf.get("auto_map")
    if not isinstance(auto_map, dict):
        return {}
    return {name: auto_map[name] for name in OWN_CLASSES if isinstance(auto_map.get(name), str)}


def check_own_code(cfg):
    """Raise Mistake if verify would run a folder's own code without being asked to."""
    folder = find(cfg.folder)
    classes = own_classes(read_json(folder / "config.json"))
    if not classes or cfg.trust_remote_code:
        return
    files = {path.name for path in folder.glob("*.py")}
    for reference in classes.values():
        repo, dashes, local = reference.rpartition("--")
        file = local.partition(".")[0] + ".py"
        files.add(f"{file} of huggingface.co/{repo}" if dashes else file)
    raise Mistake(f"{folder} brings its own code, which verify would run: "
                  f"{', '.join(sorted(files))}; read it, then add --trust_remote_code=true")


@torch.no_grad()
def verify(cfg, model, tok, recipe):
    """Compare our logits with those of the folder's own code on two random texts.

    That code is run by `transformers`: the folder's where it brings some, else transformers' own.
    Both models see what the objective sees: the past, the whole text, or blocks of K tokens.
    Prints the difference and returns whether it is within LIMITS.
    Raises Mistake for what cannot be compared, and for any failure of the other code.
    """
    folder = find(cfg.folder)
    hf = read_json(folder / "config.json")
    if not 2 <= cfg.tokens <= model.cfg.context:
        raise Mistake(f"tokens={cfg.tokens} must be from 2 to the model's context of "
                      f"{model.cfg.context}")
    if hf.get("model_type") in ("Dream", "CoDA") and recipe.objective != "bidirectional":
        raise Mistake(f"the code of a {hf['model_type']} folder sees the whole text: "
                      f"objective={recipe.objective!r} is not what it does")

    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(tok.vocab_size, (2, cfg.tokens), generator=generator)  # (2, T)
    doc_start = torch.zeros(tokens.shape, dtype=torch.int32)
    spans = Spans.of(doc_start, doc_start + cfg.tokens, recipe.attention_block)
    ours = model.logits(model(tokens, spans))  # (2, T, vocab)
    theirs, name, version = their_logits(cfg, folder, hf, tokens, spans.dense_mask(),
                                         model.cfg.vocab_size)

    error = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    same = (ours.argmax(-1) == theirs.argmax(-1)).float().mean().item()
    limit = LIMITS[cfg.dtype]
    print(f"{folder}: {name} in {cfg.dtype}, {recipe.objective}, {version}; largest difference of "
          f"two logits {error:.1e} of the largest logit (limit {limit:.0e}), the same first choice "
          f"at {same:.1%} of the tokens")
    if error <= limit:
        return True
    if other_version(hf):
        print(f"config.json was written by another transformers: {other_version(hf)}")
    return False


def their_logits(cfg, folder, hf, tokens, sees, vocab_size):
    """The folder's logits for tokens (B, T) as transformers computes them.

    sees: (B, T, T) bool, who attends to whom.
    Returns ((B, T, vocab) float32, the class' name, the version in words). Raises Mistake if it
    fails.
    """
    try:
        import transformers
    except ImportError as error:
        raise Mistake(f"verify runs transformers, which cannot be imported ({first_line(error)}); "
                      "`pip install transformers`") from error
    try:
        theirs = load_theirs(cfg, folder, hf)
        version = f"transformers {transformers.__version__}"
        if untie(theirs, folder, hf):
            version += ", which tied its head to its embedding and was given the file's"
        output = theirs(tokens, use_cache=False, **their_mask(hf, sees, theirs.dtype))
        logits = (output[0] if isinstance(output, tuple) else output.logits).float()
        if logits.shape != (*tokens.shape, vocab_size):
            raise ValueError(f"its logits have shape {tuple(logits.shape)}")
    except Exception as error:  # code of other people's: anything can be raised
        if out_of_memory(type(error), error):
            raise
        raise Mistake(failure(folder, hf, error)) from error
    return logits, type(theirs).__name__, version


def load_theirs(cfg, folder, hf):
    """The folder's model, loaded by transformers.

    Attention is eager, the one kind that every class has: CoDA's refuses SDPA under some versions.
    """
    import transformers
    classes = own_classes(hf)
    loader = transformers.AutoModelForCausalLM
    if classes and "AutoModelForCausalLM" not in classes:
        loader = transformers.AutoModel
    keyword = "dtype" if major_minor(transformers.__version__) >= (4, 56) else "torch_dtype"
    options = {keyword: getattr(torch, cfg.dtype), "attn_implementation": "eager"}
    own_code = bool(classes) and cfg.trust_remote_code
    return loader.from_pretrained(str(folder), trust_remote_code=own_code, **options).eval()


def untie(theirs, folder, hf):
    """Give a model the head of the folder's file if it tied its head to its embedding instead.

    Returns whether it had to. CoDA's config.json does not say `tie_word_embeddings`, the default of
    its code is to tie, and transformers 4.54 and later do so although the file has a head.
    """
    weights = dict(theirs.named_parameters(remove_duplicate=False))
    head, embedding = weights.get("lm_head.weight"), weights.get("model.embed_tokens.weight")
    in_files = weight_files(folder)
    if head is not embedding or hf.get("tie_word_embeddings") or "lm_head.weight" not in in_files:
        return False
    with opened(in_files["lm_head.weight"]) as f:
        tensor = f.get_tensor("lm_head.weight").to(head.dtype)
    theirs.lm_head.weight = torch.nn.Parameter(tensor)
    return True


def their_mask(hf, sees, dtype):
    """What the other model's forward() wants as attention_mask, as a dict of arguments.

    sees: (B, T, T) bool. dtype: of that model's weights.
    """
    if hf.get("model_type") in ("Dream", "CoDA"):  # every token sees the whole text
        return {}
    if hf.get("model_type") == "sdar":  # takes a mask of true and false
        return {"attention_mask": sees[:, None]}  # (B, 1, T, T)
    mask = torch.zeros(sees.shape, dtype=dtype)  # transformers' own classes add it to the scores
    mask.masked_fill_(~sees, torch.finfo(dtype).min)
    return {"attention_mask": mask[:, None]}  # (B, 1, T, T)


def failure(folder, hf, error):
    """What went wrong in other people's code, and which transformers to try, in a sentence."""
    import transformers
    whose = "its own code" if own_classes(hf) else "transformers' code for it"
    said = (f"{folder}: {whose} failed under transformers {transformers.__version__} "
            f"({type(error).__name__}: {first_line(error)})")
    if other_version(hf):
        return f"{said}; its config.json was written by another: {other_version(hf)}"
    return f"{said}; its config.json names no other version to try"


def other_version(hf):
    """What to install if config.json was written by another transformers than the installed one.

    Returns '' where it was not, or does not say. Patch releases count as the same version.
    """
    import transformers
    wanted = major_minor(hf.get("transformers_version"))
    if wanted is None or wanted == major_minor(transformers.__version__):
        return ""
    return (f"`pip install \"transformers=={wanted[0]}.{wanted[1]}.*\"` into an environment of its "
            "own and verify there")


def major_minor(version):
    """(4, 57) of '4.57.6'; None of what is no version."""
    match = re.match(r"(\d+)\.(\d+)", str(version))
    return (int(match[1]), int(match[2])) if match else None


def first_line(error):
    """The first line of an error's message."""
    return str(error).strip().partition("\n")[0]
