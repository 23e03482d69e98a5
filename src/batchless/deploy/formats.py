"""The formats in which a network leaves this package: the bytes of a file, and what reads them again."""

import io
import json
from collections.abc import Callable
from dataclasses import asdict
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from batchless.deploy.folded import About

Run = Callable[[Tensor], Tensor]
"""Images `[N, 3, S, S]` to scores `[N, classes]`."""

METADATA = "batchless.json"
"""Name of the file within a `.pt2` that says what `About` says."""

_CONVOLUTIONS = tuple(
    getattr(torch.ops.aten, name)
    for name in (
        "conv1d",
        "conv2d",
        "conv3d",
        "conv_transpose1d",
        "conv_transpose2d",
        "conv_transpose3d",
        "convolution",
    )
)


def traced(model: nn.Module, example: Tensor, *, name: str) -> ExportedProgram:
    """`model` as one graph for any number of images, in which every convolution's weight is a stored tensor.

    Args:
        model: folded, in evaluation mode.
        example: at least two images; torch takes the number 1 for a constant.
        name: of the architecture, for the message of an error.

    Raises:
        ValueError: torch cannot trace the network, or it computes the weight of a convolution.
    """
    batch = torch.export.Dim("batch", min=1)
    try:
        program = torch.export.export(model, (example,), dynamic_shapes=({0: batch},))
    except Exception as error:  # whatever the code of a network makes the tracer raise
        raise ValueError(
            f"torch.export cannot trace {name} for any number of images ({_first_line(error)}): use --format torch"
        ) from error
    for node in program.graph.nodes:
        overloads = getattr(node.target, "overloadpacket", None)
        if overloads in _CONVOLUTIONS and getattr(node.args[1], "op", None) != "placeholder":
            raise ValueError(
                f"cannot export {name}: the weight of its convolution {node.name} is computed in the forward"
            )
    return program


def program_bytes(program: ExportedProgram, about: About) -> bytes:
    """The content of a `.pt2` file."""
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={METADATA: json.dumps(asdict(about))})
    return buffer.getvalue()


def run_program(content: bytes) -> Run:
    """The network in the content of a `.pt2` file."""
    run: Run = torch.export.load(io.BytesIO(content)).module()
    return run


def require_onnx() -> None:
    """Raise ValueError if a package of the extra `onnx` is missing."""
    missing = [name for name in ("onnx", "onnxruntime", "onnxscript") if find_spec(name) is None]
    if missing:
        raise ValueError(
            f"--format onnx needs {', '.join(missing)}, which are not installed: run pip install 'batchless[onnx]', or "
            "choose another format"
        )


def onnx_bytes(program: ExportedProgram, about: About, *, opset: int | None) -> bytes:
    """The content of an `.onnx` file, with `about` in its metadata as JSON texts.

    Raises:
        ValueError: torch cannot express the network in that opset, or the file would be above 2 GiB.
    """
    import onnx

    try:
        exported: Any = torch.onnx.export(
            program,
            input_names=["images"],
            output_names=["scores"],
            dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),  # names the dimension in the file
            opset_version=opset,
            external_data=False,
            verbose=False,
            dynamo=True,
        )
        proto: Any = exported.model_proto
    except Exception as error:  # many kinds, of several libraries
        raise ValueError(
            f"torch cannot write {about.model} as ONNX ({_first_line(error)}): try another --opset or --format"
        ) from error
    written = {item.domain: item.version for item in proto.opset_import}[""]
    if opset not in (None, written):
        raise ValueError(f"torch writes {about.model} in opset {written} only, not {opset}: leave --opset out")
    _require_stored_weights(proto, about)
    for part in (
        proto,
        proto.graph,
        *proto.graph.node,
        *proto.graph.input,
        *proto.graph.output,
        *proto.graph.value_info,
    ):
        del part.metadata_props[:]  # the exporter's diary, with paths of this machine
    onnx.helper.set_model_props(proto, {name: _text(value) for name, value in asdict(about).items()})
    try:
        content: bytes = proto.SerializeToString()
    except Exception as error:  # protobuf's limit is an error of its own library
        raise ValueError(
            f"{about.model} does not fit in one .onnx file ({_first_line(error)}): use another format"
        ) from error
    return content


def run_onnx(content: bytes) -> Run:
    """The network in the content of an `.onnx` file, as onnxruntime runs it on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors: what its optimizer does is of no interest here
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def _require_stored_weights(proto: Any, about: About) -> None:
    stored = {tensor.name for tensor in proto.graph.initializer}
    for node in proto.graph.node:
        if node.op_type in ("Conv", "ConvTranspose") and node.input[1] not in stored:
            raise ValueError(f"cannot export {about.model}: the weight of {node.name} is computed in the ONNX graph")


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "")[:200] or type(error).__name__
