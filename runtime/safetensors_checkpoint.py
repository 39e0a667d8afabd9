"""A model stored as a Hugging Face folder: config.json and one or more safetensors files."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path

import torch

from fusec.errors import UserError

INDEX = "model.safetensors.index.json"
LARGEST_HEADER = 100 << 20  # the safetensors format's own limit
BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64, "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt")


class SafetensorsCheckpoint:
    """A folder with config.json and `*.safetensors` as a checkpoint (see checkpoint.py)."""

    def __init__(self, folder):
        self.path = Path(folder)
        self.name = folder_name(self.path)
        self.config = read_json(self.path / "config.json")
        if method := (self.config.get("quantization_config") or {}).get("quant_method"):
            raise UserError(
                f"{self.name} stores quantised weights",
                expected="weights as float32, float16 or bfloat16",
                found=f"quantization_config with the method {method}",
                hint="use the model's unquantised checkpoint, or a GGUF of it",
            )
        self._shapes, self._files, self._open = {}, {}, {}
        for file, wanted in weight_files(self.path):
            shapes = read_header(file)
            if wanted and (missing := wanted - shapes.keys()):
                found = f"no {min(missing)}" + (f" and {len(missing) - 1} others" if len(missing) > 1 else "")
                raise UserError(f"{file} does not hold what {INDEX} says", expected=f"{len(wanted)} tensors", found=found)
            self._shapes |= shapes
            self._files |= dict.fromkeys(shapes, file)

    def keys(self) -> list[str]:
        return list(self._shapes)

    def shape(self, key) -> tuple[int, ...]:
        self._check(key)
        return self._shapes[key]

    def load(self, key, dtype=torch.float32) -> torch.Tensor:
        """The parameter `key` on the CPU; a view of the mapped file where `dtype` is the stored one."""
        from safetensors import SafetensorError, safe_open

        self._check(key)
        file = self._files[key]
        try:
            if file not in self._open:
                self._open[file] = safe_open(file, framework="pt")
            return self._open[file].get_tensor(key).to(dtype)
        except (SafetensorError, OSError) as error:
            raise UserError(f"cannot read tensor {key} of {file}", found=str(error), hint="download the file again") from None

    def _check(self, key):
        if key not in self._shapes:
            from .checkpoint import no_such_tensor

            raise no_such_tensor(self, key)


def folder_name(folder):
    """What to call a folder: the model's id if the folder lies in the Hugging Face cache (models--ORG--NAME/snapshots/HASH)."""
    owner = folder.parent.parent.name
    return owner.removeprefix("models--").replace("--", "/") if owner.startswith("models--") else folder.resolve().name


def read_json(path) -> dict:
    """The JSON object in a file; UserError if it is missing, no JSON, or no object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{path.parent} is no model folder",
            expected=f"a file {path.name}",
            found="none",
            hint="pass a folder as Hugging Face stores it: config.json, tokenizer.json and *.safetensors",
        ) from None
    except OSError as error:
        raise UserError(f"cannot open {path}", found=error.strerror) from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not valid JSON", found="bytes that are no UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON", found=f"{error.msg} at line {error.lineno}, column {error.colno}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is not what it should be", expected="a JSON object", found=type(content).__name__)
    return content


def weight_files(folder) -> list[tuple[Path, set[str] | None]]:
    """The folder's weight files, each with the keys that the index promises there (None without an index)."""
    if (folder / INDEX).exists():
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise UserError(f"{folder / INDEX} is no index", expected="an object weight_map of key: file name", found="none")
        shards = {}
        for key, name in weight_map.items():
            shards.setdefault(name, set()).add(key)
        outside = [name for name in shards if Path(name).name != name]
        if outside:
            raise UserError(f"{folder / INDEX} points outside its folder", expected="plain file names", found=outside[0])
        missing = [name for name in shards if not (folder / name).exists()]
        if missing:
            names = ", ".join(sorted(missing)[:4]) + (" …" if len(missing) > 4 else "")
            raise UserError(
                f"{folder} lacks part of the weights",
                expected=f"{len(shards)} shards",
                found=f"{len(shards) - len(missing)}; missing: {names}",
                hint="download the missing files",
            )
        return [(folder / name, keys) for name, keys in sorted(shards.items())]

    single = folder / "model.safetensors"
    files = [single] if single.exists() else sorted(folder.glob("*.safetensors"))
    if files:
        return [(file, None) for file in files]
    pickles = sorted(file.name for pattern in PICKLES for file in folder.glob(pattern))
    raise UserError(
        f"{folder} holds no safetensors file",
        expected="model.safetensors, or shards with an index",
        found=f"{pickles[0]}, a pickle: opening one can run code, so it is never read" if pickles else "none",
        hint="get the model's safetensors files, or convert it: AutoModel.from_pretrained(…).save_pretrained(…)",
    )


def read_header(path) -> dict[str, tuple[int, ...]]:
    """Key -> shape, after checking that the header is sound and each tensor's bytes lie inside the file.

    Layout (https://github.com/huggingface/safetensors#format): header length u64, header JSON, data.
    """
    try:
        with open(path, "rb") as file:
            size, length = path.stat().st_size, int.from_bytes(file.read(8), "little")
            if size < 8 or length > LARGEST_HEADER or 8 + length > size:
                expected = f"a header of {length:,} bytes" if 0 < length <= LARGEST_HEADER else "a safetensors header"
                raise _damaged(path, expected, f"a file of {size:,} bytes")
            raw = file.read(length)
    except OSError as error:
        raise UserError(f"cannot open {path}", found=error.strerror) from None
    try:
        header = json.loads(raw)
        tensors = {key: value for key, value in header.items() if key != "__metadata__"}
        shapes, used = {}, 0
        for key, entry in tensors.items():
            (start, end), shape = entry["data_offsets"], tuple(entry["shape"])
            if any(type(number) is not int or number < 0 for number in (start, end, *shape)):
                raise ValueError(f"negative or fractional sizes for {key}")
            if (end - start) * 8 != prod(shape) * BITS[entry["dtype"]]:
                raise _damaged(path, f"{entry['dtype']} {list(shape)} for {key}", f"{end - start:,} bytes")
            shapes[key], used = shape, max(used, end)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(path, "a header of JSON with dtype, shape and data_offsets", f"{type(error).__name__}: {error}") from None
    if 8 + length + used > size:
        raise UserError(
            f"{path} is truncated",
            expected=f"{8 + length + used:,} bytes",
            found=f"{size:,} bytes",
            hint="download the file again",
        )
    return shapes


def _damaged(path, expected, found):
    return UserError(f"{path} is damaged", expected=expected, found=found, hint="download the file again")
