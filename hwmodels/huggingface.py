"""Which model is meant: shipped profiles and Hugging Face configurations, read into a ModelShape."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from hwmodels.architectures import READERS, llama
from hwmodels.configkeys import Llama
from hwmodels.errors import ProfileError
from hwmodels.shape import ModelShape
from hwmodels.yamlfiles import PROFILES, is_path, named, nearest, read_as

#: Keys with a meaning in a Llama configuration, or none for a model's shape.
PLAIN_KEYS = frozenset(
    [
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "intermediate_size",
        "vocab_size",
        "max_position_embeddings",
        "tie_word_embeddings",
        "attention_bias",
        "mlp_bias",
        "model_type",
        "architectures",
        "auto_map",
        "name_or_path",
        "_name_or_path",
        "attention_dropout",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "dtype",
        "torch_dtype",
        "hidden_act",
        "initializer_range",
        "pretraining_tp",
        "quantization_config",
        "rms_norm_eps",
        "rope_parameters",
        "rope_scaling",
        "rope_theta",
        "transformers_version",
        "use_cache",
    ]
)


def shape_from_config(config: Mapping[str, Any], name: str, where: str | None = None) -> ModelShape:
    """The model a Hugging Face configuration describes.

    config   the keys of config.json; the language model may be nested as text_config
    where    file the configuration came from, for error messages; the name by default

    Raises ProfileError for an architecture not known, and for a key that is missing or impossible.
    """
    where = where or name
    if not isinstance(config, Mapping):
        raise ProfileError(f"{where}: {type(config).__name__} found, expected a mapping of config.json keys")
    nested = config.get("text_config")
    if isinstance(nested, Mapping):
        inherited = {key: config[key] for key in ("model_type", "tie_word_embeddings") if key in config}
        config = {**inherited, **nested}
    kind = config.get("model_type")
    if not isinstance(kind, str):
        raise ProfileError(f"{where}: model_type is {kind!r}, expected one of {', '.join(READERS)}")
    if kind in READERS:
        return READERS[kind](config, name, where)
    unusual = [key for key, value in config.items() if value and key not in PLAIN_KEYS]
    lacking = [key for key, field in Llama.model_fields.items() if field.is_required() and key not in config]
    if unusual or lacking:
        reason = f"unlike Llama it has {unusual[0]}" if unusual else f"unlike Llama it lacks {lacking[0]}"
        raise ProfileError(f"{where}: model_type {kind!r} is not supported ({reason}); supported: {', '.join(READERS)}")
    return llama(config, name, where)


@dataclass(frozen=True, slots=True, config=ConfigDict(extra="forbid"))
class ModelProfile:
    """A shipped model: facts and where they come from.

    published_parameters   number of parameters its maker published, in published_in
    published_exact        whether that is the exact count rather than a rounded one
    repository             where its weights are on Hugging Face; None where there are none
    config                 keys of the model's config.json
    """

    name: str
    source: str
    published_parameters: Annotated[int, Field(gt=0, strict=True)]
    published_in: str
    published_exact: bool
    config: dict[str, Any]
    repository: str | None = None


def model_names() -> list[str]:
    """Names of the shipped models."""
    return sorted(path.stem for path in (PROFILES / "models").glob("*.yaml"))


def load_profile(name: str) -> ModelProfile:
    """The facts of the shipped model `name`, or those in the YAML file at the path `name`.

    Raises ProfileError for an unknown name or an invalid file.
    """
    return read_as(ModelProfile, named("model", name, PROFILES / "models"))


def load_model(name_or_path: str) -> ModelShape:
    """A shipped model by name, or that of a config.json (its path or its folder's) or of a model profile in YAML.

    Raises ProfileError for an unknown name and for a file that cannot be read.
    """
    return shape_from_config(*_config_of(name_or_path))


def stored_weights(name_or_path: str) -> str | None:
    """The format (hwmodels.mapping.WEIGHT_FORMATS) a model's checkpoint keeps its weights in, as its config.json says.

    'fp8_block' for fp8 in blocks of 128 x 128 (DeepSeek-V3, Kimi-K2, MiniMax-M2), 'fp8' for fp8 with coarser scales;
    None for weights that are not quantised, and for methods this does not read. Raises as load_model does.
    """
    config, *_ = _config_of(name_or_path)
    nested = config.get("text_config") if isinstance(config, Mapping) else None
    keys = [part.get("quantization_config") for part in (config, nested) if isinstance(part, Mapping)]
    found = next((part for part in keys if isinstance(part, Mapping)), {})
    if found.get("quant_method") != "fp8":
        return None
    return {"None": "fp8", "[128, 128]": "fp8_block"}.get(str(found.get("weight_block_size")))


def _config_of(name_or_path: str) -> tuple[Any, str, str]:
    """The keys of a model's config.json, what it is called, and where they are from."""
    if name_or_path in model_names() or name_or_path.endswith((".yaml", ".yml")):
        profile = load_profile(name_or_path)
        where = name_or_path if is_path(name_or_path) else f"{name_or_path}.yaml"
        return profile.config, profile.name, where
    path = Path(name_or_path)
    try:
        path = path / "config.json" if path.is_dir() else path
        if not path.is_file():
            raise ProfileError(unknown(name_or_path))
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        shown = name_or_path if len(name_or_path) <= 200 else name_or_path[:197] + "..."
        raise ProfileError(f"{shown}: cannot be read ({error.strerror}); check the path") from None
    except (ValueError, RecursionError) as error:
        raise ProfileError(f"{path}: is not JSON ({error}); expected a Hugging Face config.json") from None
    name = path.resolve().parent.name if path.name == "config.json" else path.stem
    return config, name, str(path)


def unknown(name: str) -> str:
    """What to say of a name that is neither a shipped model nor a file."""
    near = nearest(name.rsplit("/", 1)[-1], model_names())
    return f"unknown model {name!r}; nearest: {', '.join(near)} (or give a config.json or its folder)"
