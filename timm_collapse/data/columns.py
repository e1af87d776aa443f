"""Which columns of a table are the images and their labels, by Hugging Face's features or by name and type."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from ..order import CollapseError

IMAGE_NAMES, LABEL_NAMES = ("image", "img"), ("label", "labels", "fine_label")
"""Where several columns would do, the first of these names is taken."""


def features_of(schema: pa.Schema) -> dict[str, Any]:
    """Column -> its feature as `datasets` writes it: {"_type": "Image"}, {"_type": "ClassLabel", "names": ...} ...

    Where no column is called an image, those of bytes count as such, and those of a struct with the field "bytes".
    """
    try:
        said = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, ValueError, TypeError):
        said = {}
    by_type = {field.name: _feature(field.type) for field in schema}
    features = {name: said.get(name, feature) for name, feature in by_type.items()}
    if _of_type(features, "Image"):
        return features
    return features | {name: by_type[name] for name in _of_type(by_type, "Image")}


def _feature(type_: pa.DataType) -> dict[str, Any]:
    if pa.types.is_binary(type_) or pa.types.is_large_binary(type_):
        return {"_type": "Image"}
    if pa.types.is_struct(type_) and type_.get_field_index("bytes") >= 0:
        return {"_type": "Image"}
    return {"_type": "Value", "dtype": str(type_)}


def image_column(features: Mapping[str, Any], source: str | Path) -> str:
    """The column of images.

    Raises:
        CollapseError: There is none, or there are several and none is named "image" or "img".
    """
    found = _of_type(features, "Image")
    column = next((name for name in IMAGE_NAMES if name in found), found[0] if len(found) == 1 else None)
    if column is None:
        what = f"several columns of images, {found}, and" if found else "no column of images and"
        raise CollapseError(
            f"dataset: {source} has {what} no column {' or '.join(map(repr, IMAGE_NAMES))}, only {list(features)}"
        )
    return column


def label_column(features: Mapping[str, Any]) -> tuple[str | None, dict[str, int], str]:
    """The column of labels, the labels of its class names, and why there is none, in words."""
    classes = _of_type(features, "ClassLabel")
    column = next((name for name in LABEL_NAMES if name in classes), classes[0] if len(classes) == 1 else None)
    if column is not None:
        return column, {name: index for index, name in enumerate(features[column].get("names") or ())}, ""
    if not classes:
        column = next((name for name in LABEL_NAMES if "int" in str(_dtype(features.get(name)))), None)
        if column is not None:
            return column, {}, ""
    why = f"several columns are ClassLabels, {classes}" if classes else "none is a ClassLabel"
    names = ", ".join(map(repr, LABEL_NAMES))
    return None, {}, f"of its columns {list(features)}, {why}, and none of the integers is named {names}"


def image_bytes(value: Mapping[str, Any] | bytes | None, folder: Path | None = None) -> bytes:
    """The encoded image of a cell.

    Args:
        value: {"bytes": ..., "path": ...} or the bytes; where there are none, the file of that path is read.
        folder: Which paths are relative to.

    Raises:
        ValueError, OSError: The cell is empty, or the file cannot be read.
    """
    if isinstance(value, bytes):
        return value
    if not value or (value["bytes"] is None and not value.get("path")):
        raise ValueError("its cell is empty")
    return (folder or Path()).joinpath(value["path"]).read_bytes() if value["bytes"] is None else value["bytes"]


def _of_type(features: Mapping[str, Any], type_: str) -> list[str]:
    return [name for name, feature in features.items() if isinstance(feature, dict) and feature.get("_type") == type_]


def _dtype(feature: Any) -> Any:
    return feature.get("dtype", "") if isinstance(feature, dict) else ""
