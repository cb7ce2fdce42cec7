"""What a checkpoint that came quantized is, in the words of a spec: the variant that its ``config.json`` describes.

A variant of scheme none deploys such a checkpoint as it is, so it is judged as the variant that would have made it. Reads
``config.json`` only; the tensors are held against it by the steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from enginesmith.schemes import KV_CACHE_ALGORITHMS, SCHEMES, SchemeName
from enginesmith.spec import Variant


def stored_section(hf_config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The section that says how the checkpoint came quantized, or None where it did not."""
    section = hf_config.get("quantization_config")
    return section if isinstance(section, dict) else None


def stored_algorithm(section: Mapping[str, Any]) -> str:
    """What the section calls its quantization, for people."""
    return str(section.get("quant_algo") or section.get("quant_method") or "an unnamed method")


def stored_scheme(section: Mapping[str, Any]) -> SchemeName | None:
    """The scheme whose algorithm the section names, or None where it is none of ours."""
    algorithm = section.get("quant_algo")
    return next(
        (scheme.name for scheme in SCHEMES.values() if algorithm and scheme.quant_algo == algorithm), None
    )


def as_stored(variant: Variant, hf_config: Mapping[str, Any]) -> Variant:
    """``variant``, or for scheme none of a quantized checkpoint the variant that it came as."""
    section = stored_section(hf_config)
    if variant.scheme != "none" or section is None:
        return variant
    excluded = _excluded(section)
    scheme = stored_scheme(section) or "none"
    # Not validated: what others quantized need not be what a spec may ask for, e.g. in groups of 16.
    return Variant.model_construct(
        scheme=scheme,
        group_size=_group_size(section) if SCHEMES[scheme].grouped else None,
        kv_cache=_kv_cache(section),
        lm_head="none" if "lm_head" in excluded else "scheme",
        exclude=tuple(pattern for name in excluded for pattern in (name, f"{name}.*")),
    )


def _group_size(section: Mapping[str, Any]) -> int | None:
    size = section.get("group_size")
    return size if type(size) is int and size > 0 else None


def _excluded(section: Mapping[str, Any]) -> tuple[str, ...]:
    """Module paths and globs; a path stands for what is below it too."""
    patterns = section.get("exclude_modules", section.get("ignore"))
    return tuple(map(str, patterns)) if isinstance(patterns, list) else ()


def _kv_cache(section: Mapping[str, Any]) -> str:
    scheme = section.get("kv_cache_scheme")
    name = section.get("kv_cache_quant_algo")
    if name is None and isinstance(scheme, dict):
        name = {"float8": "FP8", "int8": "INT8"}.get(f"{scheme.get('type')}{scheme.get('num_bits')}")
    return KV_CACHE_ALGORITHMS.get(str(name), "none")
