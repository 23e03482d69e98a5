"""Exported files, read as their users do."""

from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch

from batchless.deploy import load_folded

FORMATS = ["torch", "onnx", "exported_program"]


def file(format: str) -> str:
    """A name for a file of that format."""
    return {"torch": "net.pt", "onnx": "net.onnx", "exported_program": "net.pt2"}[format]


def run_file(path: Path, inputs: torch.Tensor) -> Any:
    """The scores, or what else by name, that the network in a file gives."""
    if path.suffix == ".onnx":
        session = session_of(path)
        outputs = session.run(None, {session.get_inputs()[0].name: inputs.numpy()})
        named = dict(zip([port.name for port in session.get_outputs()], map(torch.from_numpy, outputs), strict=True))
        return named["scores"] if len(named) == 1 else named
    return torch.export.load(path).module()(inputs) if path.suffix == ".pt2" else load_folded(path).model(inputs)


def told(path: Path) -> dict[str, str]:
    """What an ONNX file says of itself."""
    return dict(session_of(path).get_modelmeta().custom_metadata_map)


def session_of(path: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def plain_weights(path: Path) -> list[bool]:
    """For each convolution of an ONNX file, whether its weight is stored."""
    graph = onnx.load(path).graph
    stored = {tensor.name for tensor in graph.initializer}
    return [node.input[1] in stored for node in graph.node if node.op_type in ("Conv", "ConvTranspose")]
