"""Files that other programs run, made from a `Graph`; and the same files opened again, to check and to time them.

ONNX, TorchScript and OpenVINO are run by tests. TensorRT needs an NVIDIA GPU and has not been tested.
"""

from __future__ import annotations

import importlib
import json
import logging
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

from detr_exp.deploy.graph import Graph
from detr_exp.values import Values

Run = Callable[[Sequence[np.ndarray]], list[np.ndarray]]  # inputs in the graph's order -> outputs in its order
SUFFIX = {"onnx": ".onnx", "torchscript": ".torchscript", "openvino": ".xml", "tensorrt": ".engine"}
FACTS = "detr_exp"  # the key of the metadata, a JSON text
LARGEST_BATCH = 16  # of a TensorRT engine for open batch sizes
WORKSPACE = 4 << 30  # bytes TensorRT may use while it builds


def write(
    form: str, graph: Graph, path: Path, *, facts: Values, batch_size: int | None = None, half: bool = False
) -> None:
    """Write a graph as a file.

    Args:
        form: one of `SUFFIX`.
        graph: on its device; converted to half precision on request.
        path: of the file, with its suffix; OpenVINO writes its weights beside it.
        facts: metadata for programs; stored inside the file (TensorRT: beside it, as `.json`).
        batch_size: images per run, exactly; None: any number.
        half: float16; with OpenVINO for the weights only; the processor chooses the precision of the computation.

    Raises:
        ValueError: the format is unknown, or its package is not installed.
    """
    if form not in SUFFIX:
        raise ValueError(f"format is {form!r}; use one of {', '.join(SUFFIX)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    if half and form != "openvino":
        graph.half()
    writers = {"onnx": _onnx, "torchscript": _torchscript, "openvino": _openvino, "tensorrt": _tensorrt}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing warns about things that tests and the gate check
        writers[form](graph, path, json.dumps(facts, ensure_ascii=False), batch_size, half)


def open_file(form: str, path: Path, threads: int | None = None) -> Run:
    """Open a file of `write` for running, on the CPU (TensorRT: the first GPU) in `threads` threads."""
    return {"onnx": _run_onnx, "torchscript": _run_torchscript, "openvino": _run_openvino, "tensorrt": _run_tensorrt}[
        form
    ](path, threads)


def in_torch(graph: Graph, autocast: torch.dtype | None = None) -> Run:
    """The graph itself, run by PyTorch on its device."""

    @torch.inference_mode()
    def run(inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        device = graph.network.pixel_mean.device
        tensors = [torch.from_numpy(value).to(device) for value in inputs]
        with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
            outputs = graph(*tensors)
        return [output.cpu().numpy() for output in outputs]

    return run


def _onnx(graph: Graph, path: Path, facts: str, batch_size: int | None, half: bool) -> None:
    package("onnxscript", "export")
    for name in ("onnxscript", "onnx_ir", "torch.onnx"):
        logging.getLogger(name).setLevel(logging.ERROR)  # they log every constant that they do not change
    # an example of one image, or of one pixel, would be traced as the constant one
    example = graph.example(batch_size or 2)
    open_axes: Values = {name: {} if batch_size else {0: "batch"} for name in graph.inputs}
    if graph.preprocess:
        open_axes["images"] |= {1: "height", 2: "width"}
    program = torch.onnx.export(
        graph,
        example,
        dynamo=True,
        input_names=graph.inputs,
        output_names=graph.outputs,
        dynamic_shapes=open_axes,
        verbose=False,
    )
    assert program is not None
    for (
        node
    ) in program.model.graph:  # lines of source that made it, with paths of this machine: a third of a small file
        node.metadata_props.clear()
    program.model.metadata_props[FACTS] = facts
    program.save(path)


def _run_onnx(path: Path, threads: int | None) -> Run:
    runtime = package("onnxruntime", "export")
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads or 0
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_inputs()]
    return lambda inputs: session.run(None, dict(zip(names, inputs)))


def _torchscript(graph: Graph, path: Path, facts: str, batch_size: int | None, half: bool) -> None:
    traced = torch.jit.trace(graph, graph.example(batch_size or 2), check_trace=False)
    torch.jit.save(traced, str(path), _extra_files={f"{FACTS}.json": facts})


def _run_torchscript(path: Path, threads: int | None) -> Run:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that TorchScript is no longer developed
        module = torch.jit.load(str(path), map_location="cpu")

    @torch.inference_mode()
    def run(inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        return [output.numpy() for output in module(*map(torch.from_numpy, inputs))]

    return run


def _openvino(graph: Graph, path: Path, facts: str, batch_size: int | None, half: bool) -> None:
    openvino = package("openvino", "openvino")
    with tempfile.TemporaryDirectory() as folder:
        _onnx(graph, Path(folder) / "graph.onnx", facts, batch_size, half=False)
        model = openvino.convert_model(Path(folder) / "graph.onnx")
        model.set_rt_info(facts, FACTS)
        openvino.save_model(model, path, compress_to_fp16=half)


def _run_openvino(path: Path, threads: int | None) -> Run:
    openvino = package("openvino", "openvino")
    # by default it computes in bfloat16 where the processor can
    settings = {"INFERENCE_PRECISION_HINT": "f32"} | ({"INFERENCE_NUM_THREADS": threads} if threads else {})
    compiled = openvino.Core().compile_model(path, "CPU", settings)

    def run(inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        outputs = compiled(list(inputs))
        return [np.array(outputs[i]) for i in range(len(compiled.outputs))]

    return run


def _tensorrt(graph: Graph, path: Path, facts: str, batch_size: int | None, half: bool) -> None:
    tensorrt = package("tensorrt", "tensorrt")
    if graph.preprocess:
        raise ValueError("TensorRT has no antialiased resize; use export.preprocess=false")
    logger = tensorrt.Logger(tensorrt.Logger.WARNING)
    builder = tensorrt.Builder(logger)
    # precision is that of the graph, operation by operation: no rounding that the gate has not checked
    network = builder.create_network(1 << int(tensorrt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = tensorrt.OnnxParser(network, logger)
    with tempfile.TemporaryDirectory() as folder:
        _onnx(graph, Path(folder) / "graph.onnx", facts, batch_size, half)
        if not parser.parse_from_file(str(Path(folder) / "graph.onnx")):
            reasons = "; ".join(str(parser.get_error(i)) for i in range(parser.num_errors))
            raise ValueError(f"TensorRT cannot read this network ({reasons}); try export.sampling=discrete")
    config = builder.create_builder_config()
    config.set_memory_pool_limit(tensorrt.MemoryPoolType.WORKSPACE, WORKSPACE)
    if batch_size is None:
        profile = builder.create_optimization_profile()
        for name, value in zip(graph.inputs, graph.example(1)):
            rest = tuple(value.shape[1:])
            profile.set_shape(name, (1, *rest), (1, *rest), (LARGEST_BATCH, *rest))
        config.add_optimization_profile(profile)
    path.write_bytes(builder.build_serialized_network(network, config))
    path.with_suffix(".json").write_text(facts + "\n", encoding="utf-8")


def _run_tensorrt(path: Path, threads: int | None) -> Run:
    tensorrt = package("tensorrt", "tensorrt")
    engine = tensorrt.Runtime(tensorrt.Logger(tensorrt.Logger.WARNING)).deserialize_cuda_engine(path.read_bytes())
    context = engine.create_execution_context()
    names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    taken = [name for name in names if engine.get_tensor_mode(name) == tensorrt.TensorIOMode.INPUT]

    def run(inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        tensors = {name: torch.from_numpy(value).cuda() for name, value in zip(taken, inputs)}
        for name, tensor in tensors.items():
            context.set_input_shape(name, tuple(tensor.shape))
        for name in names[len(taken) :]:
            kind = getattr(torch, np.dtype(tensorrt.nptype(engine.get_tensor_dtype(name))).name)
            tensors[name] = torch.empty(tuple(context.get_tensor_shape(name)), dtype=kind, device="cuda")
        for name, tensor in tensors.items():
            context.set_tensor_address(name, tensor.data_ptr())
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        context.execute_async_v3(stream.cuda_stream)
        stream.synchronize()
        return [tensors[name].cpu().numpy() for name in names[len(taken) :]]

    return run


def package(name: str, extra: str) -> ModuleType:
    """A package that only some formats need.

    Raises:
        ValueError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(f"this format needs {name} ({error}): pip install 'detr_exp[{extra}]'") from error
