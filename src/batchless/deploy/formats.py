"""The formats in which a network leaves this package: the bytes of a file, and what reads them again."""

import io
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from batchless.deploy.about import About

Run = Callable[[Tensor], Any]
"""An input to scores, or to tensors by their names."""

_BATCH: Mapping[int, str] = {0: "batch"}

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


def traced(model: nn.Module, example: Tensor, *, name: str, free: Mapping[int, str] = _BATCH) -> ExportedProgram:
    """`model` as one graph for any number of images, in which every convolution's weight is a stored tensor.

    Args:
        model: folded, in evaluation mode.
        example: at least two images; torch takes the number 1 for a constant.
        name: of the architecture, for the message of an error.
        free: the dimensions of the example that have any size, and their names.

    Raises:
        ValueError: torch cannot trace the network, or it computes the weight of a convolution.
    """
    sizes: dict[int, Any] = {0: torch.export.Dim("batch", min=1)}
    # Height and width: from whatever size on the network takes, where sizes of maps that differ in a network are not taken for
    # equal ones. The program checks what it assumes of them when it runs.
    sizes |= {dimension: torch.export.Dim.DYNAMIC for dimension in free if dimension}
    try:
        program = torch.export.export(
            model, (example,), dynamic_shapes=(sizes,), prefer_deferred_runtime_asserts_over_guards=len(free) > 1
        )
    except Exception as error:  # whatever the code of a network makes the tracer raise
        raise ValueError(
            f"torch.export cannot trace {name} for any number of images ({first_line(error)}): use --format torch"
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


def onnx_bytes(
    program: ExportedProgram,
    about: About,
    *,
    opset: int | None,
    free: Mapping[int, str] = _BATCH,
    input_name: str = "images",
) -> bytes:
    """The content of an `.onnx` file, with `about` in its metadata as JSON texts.

    Args:
        program: of `traced`.
        about: for the metadata.
        opset: None: what torch chooses.
        free: as in `traced`.
        input_name: of the input; the output is called scores.

    Raises:
        ValueError: torch cannot express the network in that opset, or the file would be above 2 GiB.
    """
    try:
        exported: Any = torch.onnx.export(
            program,
            input_names=[input_name],
            output_names=["scores"],
            dynamic_shapes=(
                {at: torch.export.Dim(name, min=1) for at, name in free.items()},
            ),  # names them in the file
            opset_version=opset,
            external_data=False,
            verbose=False,
            dynamo=True,
        )
        proto: Any = exported.model_proto
    except Exception as error:  # many kinds, of several libraries
        raise ValueError(
            f"torch cannot write {about.model} as ONNX ({first_line(error)}): try another --opset or --format"
        ) from error
    written = {item.domain: item.version for item in proto.opset_import}[""]
    if opset not in (None, written):
        raise ValueError(f"torch writes {about.model} in opset {written} only, not {opset}: leave --opset out")
    return finished_onnx(proto, about)


def finished_onnx(proto: Any, about: About) -> bytes:
    """The content of the file of an ONNX model, checked, with what its user must know in its metadata.

    Raises:
        ValueError: the weight of a convolution is computed, or the file would be above 2 GiB.
    """
    import onnx

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
            f"{about.model} does not fit in one .onnx file ({first_line(error)}): use another format"
        ) from error
    return content


def run_onnx(content: bytes) -> Run:
    """The network in the content of an `.onnx` file, as onnxruntime runs it on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors: what its optimizer does is of no interest here
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    (name,) = (port.name for port in session.get_inputs())
    names = [port.name for port in session.get_outputs()]

    def run(images: Tensor) -> Any:
        found = dict(zip(names, map(torch.from_numpy, session.run(None, {name: images.numpy()})), strict=True))
        return found["scores"] if len(names) == 1 else found

    return run


def _require_stored_weights(proto: Any, about: About) -> None:
    stored = {tensor.name for tensor in proto.graph.initializer}
    for node in proto.graph.node:
        if node.op_type in ("Conv", "ConvTranspose") and node.input[1] not in stored:
            raise ValueError(f"cannot export {about.model}: the weight of {node.name} is computed in the ONNX graph")


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def first_line(error: Exception) -> str:
    """What an error says first."""
    return next(iter(str(error).splitlines()), "")[:200] or type(error).__name__
