"""Export of a user's module: values, axes and names that are kept, and every way in which a factory can be wrong."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from encoder_factory import Context

from enginesmith.errors import EnginesmithError, SourceError, SpecError
from enginesmith.graphs.export import read_references, run
from enginesmith.graphs.signature import read_signature

X = {"name": "x", "dtype": "float32", "shape": ["batch", "width", 8]}
AXES = {"width": {"min": 2, "opt": 4, "max": 9}}
HEAD = "import torch\nfrom torch import nn\n"
LINEAR = """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(8, 5)

    def forward(self, x):
        return self.inner(x)

def make():
    return Net().eval()
"""


def forward(body: str, *, parameters: str = "self, x") -> str:
    """Source of a module whose ``forward`` has this body."""
    code = textwrap.indent(textwrap.dedent(body).strip(), "        ")
    return LINEAR.replace(
        "def forward(self, x):\n        return self.inner(x)", f"def forward({parameters}):\n{code}"
    )


def exported(tmp_path: Path, source: str, *, samples: Mapping[str, Any] | None = None, **params: Any) -> Path:
    """The ``export`` artifact of ``make`` in a file with this source."""
    tmp_path.mkdir(exist_ok=True)
    path = tmp_path / "user_model.py"
    path.write_text(HEAD + textwrap.dedent(source))
    batch = samples or {"x": np.random.default_rng(0).normal(size=(3, 4, 8)).astype(np.float32)}
    (tmp_path / "samples" / "batches").mkdir(parents=True)
    np.savez(tmp_path / "samples" / "batches" / "000.npz", **batch)
    out = tmp_path / "out"
    out.mkdir()
    keyed = {"task": "tensors", "inputs": [X], "outputs": ["y"], "axes": AXES, "factory": "make", "files": {}}
    location = {"module": str(path), "base_dir": str(tmp_path)}
    run(Context(keyed | params | {"location": location}, {"samples": tmp_path / "samples"}, out, tmp_path))
    return out


def refused(tmp_path: Path, source: str, kind: type[EnginesmithError] = SourceError, **params: Any) -> str:
    with pytest.raises(kind) as caught:
        exported(tmp_path, source, **params)
    return str(caught.value)


def run_graph(out: Path, feeds: Mapping[str, Any]) -> list[Any]:
    session = ort.InferenceSession(str(out / "model.onnx"), providers=["CPUExecutionProvider"])
    results: list[Any] = session.run(None, dict(feeds))
    return results


def test_the_graph_computes_what_the_module_does_at_other_lengths(tmp_path: Path) -> None:
    import torch

    out = exported(tmp_path, LINEAR)
    torch.manual_seed(0)
    layer = torch.nn.Linear(8, 5)
    x = np.random.default_rng(1).normal(size=(2, 9, 8)).astype(np.float32)
    np.testing.assert_allclose(
        run_graph(out, {"x": x})[0], layer(torch.from_numpy(x)).detach().numpy(), atol=1e-6
    )
    facts = json.loads((out / "export.json").read_text())
    assert facts["max_abs_difference"] < 1e-5
    lengths = [(entry["batch"], entry["width"]) for entry in facts["compared_lengths"]]
    assert lengths == [(3, 4), (1, 4), (3, 2), (1, 9)]


def test_axes_and_layers_have_the_users_names(tmp_path: Path) -> None:
    out = exported(tmp_path, LINEAR)
    signature = read_signature(out)
    assert signature.inputs[0].shape == ("batch", "width", 8)
    assert signature.outputs[0].shape == ("batch", "width", 5)
    model = onnx.load(out / "model.onnx")
    names = {node.name for node in model.graph.node}
    assert "inner/MatMul" in names
    assert {tensor.name for tensor in model.graph.initializer} == {"inner.weight", "inner.bias"}


def test_the_graph_says_nothing_of_the_machine_it_was_made_on(tmp_path: Path) -> None:
    content = (exported(tmp_path, LINEAR) / "model.onnx").read_bytes()
    assert b"user_model" not in content
    assert b"site-packages" not in content


def test_outputs_may_be_called_like_values_inside(tmp_path: Path) -> None:
    # The exporter calls its own values "linear" and "mul"; twice one name is no valid graph.
    body = "h = self.inner(x)\nreturn h * 2, h * 3 * h"
    out = exported(tmp_path, forward(body), outputs=["linear", "mul"])
    assert [tensor.name for tensor in read_signature(out).outputs] == ["linear", "mul"]


def test_a_mapping_of_outputs_is_read_by_name(tmp_path: Path) -> None:
    body = "h = self.inner(x)\nreturn {'b': h.sum(-1), 'a': h}"
    out = exported(tmp_path, forward(body), outputs=["a", "b"])
    reference = read_references(out)[0]
    assert reference["a"].shape == (3, 4, 5)
    np.testing.assert_allclose(reference["b"], reference["a"].sum(-1), atol=1e-5)


def test_inputs_are_given_by_name_where_forward_has_their_names(tmp_path: Path) -> None:
    inputs = [X, X | {"name": "shift"}]
    samples = {"x": np.zeros((3, 4, 8), np.float32), "shift": np.ones((3, 4, 8), np.float32)}
    source = forward("return x - 2 * shift", parameters="self, shift, x")
    reference = read_references(exported(tmp_path, source, inputs=inputs, samples=samples))[0]
    assert set(reference["y"].reshape(-1).tolist()) == {-2.0}


def test_whole_numbers_and_lengths_that_follow_from_others_are_exported(tmp_path: Path) -> None:
    inputs = [{"name": "x", "dtype": "int64", "shape": ["batch", "width"]}]
    samples = {"x": np.arange(12).reshape(3, 4)}
    out = exported(tmp_path, forward("return torch.cat([x, x + 1], 1)"), inputs=inputs, samples=samples)
    output = read_signature(out).outputs[0]
    assert output.dtype == "int64"
    assert output.shape == ("batch", "2*width")
    assert output.dims == (-1,)


def test_an_axis_of_one_length_is_exported_as_that(tmp_path: Path) -> None:
    out = exported(tmp_path, LINEAR, axes={"width": {"min": 4, "opt": None, "max": 4}})
    assert run_graph(out, {"x": np.zeros((2, 4, 8), np.float32)})[0].shape == (2, 4, 5)


def test_the_module_may_import_files_beside_it_and_read_its_weights(tmp_path: Path) -> None:
    (tmp_path / "its_layers.py").write_text("FACTOR = 4.0\n")
    (tmp_path / "factor.txt").write_text("2.0")
    source = (
        "import its_layers, pathlib\n"
        "EXTRA = float((pathlib.Path(__file__).parent / 'factor.txt').read_text())\n"
        + forward("return x * its_layers.FACTOR * EXTRA")
    )
    out = exported(tmp_path, source, samples={"x": np.ones((3, 4, 8), np.float32)})
    assert set(read_references(out)[0]["y"].reshape(-1).tolist()) == {8.0}


def test_a_module_or_a_file_of_it_that_changed_after_the_plan_is_refused(tmp_path: Path) -> None:
    message = refused(tmp_path / "one", LINEAR, module_sha256="of other content")
    assert "user_model.py changed after the build was planned" in message
    (tmp_path / "two" / "parts").mkdir(parents=True)
    (tmp_path / "two" / "parts" / "layer.py").write_text("WIDTH = 8\n")
    message = refused(tmp_path / "two", LINEAR, files={"parts": "of other content"})
    assert "parts changed after the build was planned" in message


def test_the_module_may_replace_the_import_path(tmp_path: Path) -> None:
    exported(tmp_path, "import sys\nsys.path = sys.path[1:]\n" + LINEAR)


def test_an_input_without_an_axis_beside_the_batch_is_refused(tmp_path: Path) -> None:
    x = {"name": "x", "dtype": "float32", "shape": ["batch"]}
    message = refused(tmp_path, LINEAR, SpecError, inputs=[x], axes={})
    assert "input x of user_model.py:make has no axis but the batch" in message


def test_an_axis_that_the_code_fixes_is_named(tmp_path: Path) -> None:
    message = refused(tmp_path, forward("return self.inner(x.reshape(-1, 4, 8))"))
    assert "axis 'width' was fixed by user_model.py:make; with a length of 2 it fails" in message


def test_an_axis_that_tracing_fixes_is_named_with_its_length(tmp_path: Path) -> None:
    body = "y = x * 0\nfor i in range(x.shape[1]):\n    y = y + x[:, i : i + 1]\nreturn y"
    message = refused(tmp_path, forward(body))
    assert "input x: axis 'width' was fixed to 4 by user_model.py:make" in message
    assert "give the axis as 4 in the spec" in message


def test_a_branch_on_values_is_named_with_its_line(tmp_path: Path) -> None:
    message = refused(tmp_path, forward("if x.sum() > 0:\n    return x\nreturn -x"))
    assert "user_model.py:make cannot be traced into a graph" in message
    assert "user_model.py:11: if x.sum() > 0:" in message


def test_an_unsupported_operator_is_named_with_its_module_and_line(tmp_path: Path) -> None:
    source = """
    class Bessel(nn.Module):
        def forward(self, x):
            return torch.special.bessel_j0(x)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(8, 8), Bessel())

        def forward(self, x):
            return self.layers(x)

    def make():
        return Net().eval()
    """
    message = refused(tmp_path, source)
    assert "bessel_j0" in message
    assert "module 'layers.1' (Bessel), user_model.py:6: return torch.special.bessel_j0(x)" in message


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "def make():\n    raise RuntimeError('no such disk')",
            "make raised RuntimeError: no such disk\n  user_model.py:4 in make: raise RuntimeError",
        ),
        ("import not_installed_anywhere\ndef make(): ...", "ModuleNotFoundError: No module named"),
        ("def make(:", "make raised SyntaxError"),
        ("def make():\n    raise SystemExit(3)", "make raised SystemExit: 3"),
        ("def make():\n    open('no/such/weights.pt')", "make raised FileNotFoundError"),
        ("def make(size): ...", "make raised TypeError"),
        ("def build(): ...", "has no function make; it has build"),
        ("def make():\n    pass", "returned None, not a torch.nn.Module"),
        ("def make():\n    return nn.Linear", "returned the class Linear, not a torch.nn.Module"),
        ("def make():\n    return nn.Linear(8, 5)", "returned a module in training mode (it)"),
        (
            "def make():\n    net = nn.Sequential(nn.Linear(8, 5)).eval()\n    net[0].train()\n    return net",
            "returned a module in training mode (its part 0)",
        ),
        ("def make():\n    return nn.Linear(8, 5).half().eval()", "weight is float16"),
        ("def make():\n    return nn.Linear(8, 5, device='meta').eval()", "weight has no values"),
        (
            "def make():\n    net = nn.Linear(8, 5).eval()\n    net.weight.data.fill_(float('nan'))\n    return net",
            "output y of user_model.py:make has NaN or Inf",
        ),
        (forward("return self.inner(x).sum()"), "has shape [] for a batch of 3"),
        (
            forward("return self.inner(x).sum((1, 2))"),
            "output y of user_model.py:make has no axis but the batch",
        ),
        (
            "def make():\n    import warnings\n    warnings.simplefilter('ignore')\n"
            "    return torch.jit.script(nn.Linear(8, 5).eval())",
            "returned a TorchScript module",
        ),
        (forward("raise ValueError('bad width')"), "does not take the samples"),
    ],
)
def test_a_factory_that_is_wrong_is_told_what_was_seen(tmp_path: Path, source: str, message: str) -> None:
    assert message in refused(tmp_path, source)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return x, x", "returns 2 tensors; the spec's outputs are y"),
        ("return {'z': x}", "returns a mapping with z; the spec's outputs are y"),
        ("return None", "returns a NoneType; the spec's outputs are y"),
        ("return [1.0]", "returns a float among its outputs"),
    ],
)
def test_other_outputs_than_the_spec_names_are_refused(tmp_path: Path, body: str, message: str) -> None:
    assert message in refused(tmp_path, forward(body), SpecError)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("import sys; sys.exit(0)", "SystemExit: 0"),
        ("return self.inner(x).bfloat16()", "BFloat16"),
        ("return self.inner(x).double()", "output y of user_model.py:make is float64; allowed: float32"),
    ],
)
def test_a_forward_that_does_not_answer_with_arrays_is_told(tmp_path: Path, body: str, message: str) -> None:
    assert message in refused(tmp_path, forward(body))


def test_inputs_that_forward_does_not_take_are_refused(tmp_path: Path) -> None:
    message = refused(tmp_path, forward("return x", parameters="self, x, mask"), SpecError)
    assert "does not take the spec's inputs x: missing a required argument: 'mask'" in message
