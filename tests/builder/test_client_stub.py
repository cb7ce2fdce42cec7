"""Generated clients: what they can do, that they are clean Python whatever a model is called, and what drift they find."""

import ast
import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from enginesmith import cli
from enginesmith.client_stub.module import class_names, methods_of, module_code
from enginesmith.client_stub.names import docstring_text, identifier_from_name, literal
from enginesmith.client_stub.source import StubModel, model_from_repository
from enginesmith.errors import SourceError
from enginesmith.triton.config import LLM_INPUTS, LLM_OUTPUTS, Tensor, config_text, model_config
from enginesmith.triton.llmapi.config import LLMAPI_INPUTS, LLMAPI_OUTPUTS
from enginesmith.triton.trtllm.tensors import bls_inputs
from enginesmith_client import ModelMetadata, SignatureDrift, TensorMetadata
from enginesmith_client.testing import FakeServer

ROOT = Path(__file__).parents[2]
RULES = "E,F,W,I,UP,B,C4,SIM,RUF,A,D1"
TEXT = Tensor("TEXT", "TYPE_STRING")
DIGEST = "4b847e13" * 8


def publish(
    repository: Path, name: str, inputs: Sequence[Tensor], outputs: Sequence[Tensor], **settings: Any
) -> None:
    """What ``enginesmith build --publish`` leaves of a model, as far as a client's generator reads it."""
    settings = {"max_batch_size": 8, "dynamic_batching": None} | settings
    config = model_config(name, inputs=inputs, outputs=outputs, **settings)
    config.version_policy.specific.versions[:] = [2]
    version = repository / name / "2"
    version.mkdir(parents=True)
    (repository / name / "3").mkdir()
    (repository / name / "config.pbtxt").write_text(config_text(config))
    (version / "release.json").write_text(json.dumps({"digest": DIGEST, "version": 2}))


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    repository = tmp_path_factory.mktemp("stubs") / "repository"
    ids = Tensor("input_ids", "TYPE_INT64", (-1,))
    mask = Tensor("class", "TYPE_BOOL", (-1,), optional=True)
    logits = Tensor("logits", "TYPE_FP32", (3,), label_file="labels.txt")
    publish(repository, "plain-1", [mask, ids], [logits, Tensor("half", "TYPE_BF16", (-1,))])
    (repository / "plain-1" / "labels.txt").write_text('calm\nlo"""ud\ncurious\n')
    publish(repository, "pieces", [ids], [Tensor("piece", "TYPE_INT64")], decoupled=True)
    publish(repository, "smollm2-int4", LLM_INPUTS, LLM_OUTPUTS, decoupled=True)
    publish(
        repository, "tensorrt_llm_bls", bls_inputs("TYPE_FP16"), [Tensor("text_output", "TYPE_STRING", (-1,))]
    )
    publish(repository, "llmapi", LLMAPI_INPUTS, LLMAPI_OUTPUTS, decoupled=True, max_batch_size=0)
    publish(repository, "sentences-text", [TEXT], [Tensor("embedding", "TYPE_FP32", (384,))])
    publish(repository, "moods-text", [TEXT], [Tensor("logits", "TYPE_FP32", (3,))])
    publish(
        repository, "rank-text", [TEXT, Tensor("TEXT_PAIR", "TYPE_STRING")], [Tensor("score", "TYPE_FP32")]
    )
    return repository


@pytest.fixture(scope="module")
def models(repository: Path) -> dict[str, StubModel]:
    names = sorted(path.name for path in repository.iterdir())
    return {name: model_from_repository(repository, name) for name in names}


@pytest.fixture(scope="module")
def code(models: dict[str, StubModel]) -> str:
    return module_code(list(models.values()), generated_by="1.2.3")


@pytest.fixture(scope="module")
def api(code: str) -> Iterator[ModuleType]:
    module = imported(code)
    yield module
    del sys.modules[module.__name__]


def imported(code: str) -> ModuleType:
    module = ModuleType("generated_api")
    sys.modules[module.__name__] = module  # Where dataclasses look up annotations.
    exec(compile(code, "api.py", "exec"), module.__dict__)
    return module


@pytest.fixture
def server(models: dict[str, StubModel], api: ModuleType) -> FakeServer:
    server = FakeServer()
    for name in ("plain-1", "pieces"):
        server.add_signature(models[name].metadata, {"plain-1": count_ids, "pieces": each_id}[name])
    server.add_llm("smollm2-int4", "a b c")
    server.add_embedder("sentences-text", width=384)
    server.add_reranker("rank-text", lambda query, document: len(document))
    return server


def count_ids(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    ids = inputs["input_ids"]
    return {
        "logits": np.full((len(ids), 3), ids.shape[1], np.float32),
        "half": np.full((len(ids), 1), "class" in inputs, np.float32),
    }


def each_id(inputs: Mapping[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
    for one in inputs["input_ids"][0]:
        yield {"piece": np.array([[one]])}


def test_what_a_class_can_do_follows_from_the_models_tensors(models: dict[str, StubModel]) -> None:
    text = ("generate", "stream", "chat", "stream_chat")
    assert {name: methods_of(model.metadata) for name, model in models.items()} == {
        "plain-1": ("infer",),
        "pieces": ("infer_stream",),
        "smollm2-int4": text,
        "tensorrt_llm_bls": ("generate", "chat"),
        "llmapi": text,
        "sentences-text": ("embed",),
        "moods-text": ("classify",),
        "rank-text": ("rerank",),
    }


def test_the_language_model_of_the_fake_server_has_the_tensors_of_those_that_are_published(
    models: dict[str, StubModel],
) -> None:
    server = FakeServer()
    server.add_llm("smollm2-int4")
    fake, published = server.client().metadata("smollm2-int4"), models["smollm2-int4"].metadata
    for side in ("inputs", "outputs"):
        assert {*getattr(fake, side)} == {*getattr(published, side)}
    assert fake.decoupled
    assert published.decoupled


def test_the_header_names_model_version_and_digest(code: str) -> None:
    assert f"- smollm2-int4: version 2, sha256 {DIGEST}\n" in code
    assert "Generated by enginesmith 1.2.3 " in code


def parameters_of(code: str, name: str, method: str) -> dict[str, str | None]:
    (found,) = [
        node
        for one in ast.parse(code).body
        if isinstance(one, ast.ClassDef) and one.name == name
        for node in one.body
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name == method
    ]
    arguments = found.args
    given = [(one, None) for one in arguments.args[1:]] + list(
        zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    )
    return {one.arg: ast.unparse(default) if default else None for one, default in given}


def test_options_are_exactly_those_that_the_model_has(code: str) -> None:
    common = {"priority": "None", "request_id": "''", "timeout_s": "None"}
    assert parameters_of(code, "Smollm2Int4", "generate").keys() == {
        "prompt", "max_tokens", "min_tokens", "temperature", "top_k", "top_p", "repetition_penalty", "presence_penalty",
        "frequency_penalty", "seed", "stop", "chat", "logprobs", *common,
    }  # fmt: skip
    assert parameters_of(code, "Llmapi", "stream").keys() == {
        "prompt", "max_tokens", "temperature", "top_k", "top_p", "presence_penalty", "frequency_penalty", "seed", "stop",
        *common,
    }  # fmt: skip
    assert "template" not in parameters_of(code, "Smollm2Int4", "chat")
    assert parameters_of(code, "Llmapi", "stream_chat")["template"] is None
    assert parameters_of(code, "TensorrtLlmBls", "generate")["max_tokens"] is None
    assert parameters_of(code, "AsyncTensorrtLlmBls", "generate")["top_k"] == "None"


def test_required_inputs_come_first_and_keywords_get_another_name(code: str) -> None:
    assert parameters_of(code, "Plain1", "infer") == {
        "input_ids": None, "class_": "None", "priority": "None", "request_id": "''", "timeout_s": "None",
    }  # fmt: skip
    assert "Tensor class, BOOL [batch of at most 8, any]." in code


def test_labels_are_in_the_docstring(api: ModuleType, code: str) -> None:
    assert "FP32 [batch of at most 8, 3]; classes: calm, lo\\x22\\x22\\x22ud, curious." in code
    assert api.Plain1.infer.__doc__.startswith("One inference.")


@pytest.mark.parametrize("command", [["format", "--diff"], ["check", "--select", RULES, "--ignore", "E501"]])
def test_the_module_is_as_ruff_wants_it(code: str, tmp_path: Path, command: Sequence[str]) -> None:
    (tmp_path / "api.py").write_text(code)
    done = subprocess.run(
        [sys.executable, "-m", "ruff", command[0], "--isolated", "--no-cache", *command[1:], "api.py"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_module_and_a_user_of_it_pass_mypy_strict(code: str, tmp_path: Path) -> None:
    (tmp_path / "api.py").write_text(code)
    (tmp_path / "user.py").write_text(USER)
    config = f"[mypy]\nstrict = true\nmypy_path = {ROOT / 'client'}\nfollow_imports = silent\n"
    (tmp_path / "mypy.ini").write_text(config)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--cache-dir", str(tmp_path / "cache"), "api.py", "user.py"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert [line for line in done.stdout.splitlines() if ": error: " in line] == [
        'user.py:11: error: Argument "input_ids" to "infer" of "Plain1" has incompatible type "ndarray[Any, dtype[floating[_32Bit]]]"; '
        'expected "ndarray[Any, dtype[signedinteger[_64Bit]]]"  [arg-type]',
        'user.py:12: error: Unexpected keyword argument "min_tokens" for "generate" of "Llmapi"; did you mean "max_tokens"?  [call-arg]',
    ], done.stdout + done.stderr


USER = """
import numpy as np
from api import AsyncPieces, Llmapi, Plain1
from enginesmith_client import Client


def use(client: Client) -> None:
    plain = Plain1.connect(client)
    plain.infer(input_ids=np.zeros((1, 2), np.int64)).logits.mean()
    floats = np.zeros((1, 2), np.float32)
    plain.infer(input_ids=floats)
    Llmapi.connect(client).generate("x", min_tokens=3)


async def use_pieces(pieces: AsyncPieces) -> int:
    return sum([one.piece.size async for one in pieces.infer_stream(input_ids=np.zeros((1, 2), np.int64))])
"""


def test_generated_classes_ask_the_server(api: ModuleType, server: FakeServer) -> None:
    with server.client() as client:
        plain = api.Plain1.connect(client)
        answer = plain.infer(input_ids=np.zeros((2, 5), np.int64), class_=np.ones((2, 1), np.bool_))
        assert answer.logits.tolist() == [[5.0] * 3] * 2
        assert answer.half.tolist() == [[1.0]] * 2
        assert not plain.infer(input_ids=np.zeros((1, 5), np.int64)).half.any()
        pieces = api.Pieces.connect(client).infer_stream(input_ids=np.array([[3, 1, 2]]))
        assert [one.piece.item() for one in pieces] == [3, 1, 2]
        llm = api.Smollm2Int4.connect(client)
        assert llm.generate("x", max_tokens=2).text == "a b"
        assert [delta.text for delta in llm.stream_chat([{"role": "user", "content": "x"}])] == [
            "a",
            " b",
            " c",
        ]
        assert api.SentencesText.connect(client).embed(["a"]).shape == (1, 384)
        assert api.RankText.connect(client).rerank("q", ["a", "abc"])[0].document == "abc"


def test_generated_classes_for_tasks_ask_the_server(api: ModuleType, server: FakeServer) -> None:
    async def ask() -> list[Any]:
        async with server.async_client() as client:
            plain = await api.AsyncPlain1.connect(client)
            pieces = await api.AsyncPieces.connect(client)
            llm = await api.AsyncSmollm2Int4.connect(client)
            return [
                (await plain.infer(input_ids=np.zeros((1, 4), np.int64))).logits[0, 0].item(),
                [one.piece.item() async for one in pieces.infer_stream(input_ids=np.array([[3, 1]]))],
                (await llm.chat([{"role": "user", "content": "x"}])).text,
                "".join([delta.text async for delta in llm.stream("x")]),
            ]

    assert asyncio.run(ask()) == [4.0, [3, 1], "a b c", "a b c"]


SIGNATURE = ModelMetadata(
    "drifting", ("1",), "python",
    (TensorMetadata("x", "FP32", (-1, 3)), TensorMetadata("y", "INT32", (-1, 1), optional=True)),
    (TensorMetadata("z", "FP32", (-1, 3)),), 8, decoupled=False,
)  # fmt: skip
X, Y = SIGNATURE.inputs
(Z,) = SIGNATURE.outputs
NEW = TensorMetadata("new", "FP32", (-1, 3))
DRIFTS: dict[str, tuple[ModelMetadata, list[str]]] = {
    "renamed input": (replace(SIGNATURE, inputs=(replace(X, name="x2"), Y)), [
        "input 'x' is missing; perhaps it is called 'x2' now", "input 'x2' (FP32 [-1, 3]) is new and required"]),
    "missing optional input": (replace(SIGNATURE, inputs=(X,)), ["input 'y' is missing"]),
    "new required input": (replace(SIGNATURE, inputs=(X, Y, NEW)), ["input 'new' (FP32 [-1, 3]) is new and required"]),
    "optional input that is required now": (replace(SIGNATURE, inputs=(X, replace(Y, optional=False))), [
        "input 'y' is required now, optional before"]),
    "dtype": (replace(SIGNATURE, inputs=(replace(X, datatype="FP16"), Y)), ["input 'x' is FP16 now, FP32 before"]),
    "dims of an output": (replace(SIGNATURE, outputs=(replace(Z, shape=(-1, 4)),)), [
        "output 'z' has the shape [-1, 4] now, [-1, 3] before"]),
    "renamed output": (replace(SIGNATURE, outputs=(replace(Z, name="w"),)), [
        "output 'z' is missing; perhaps it is called 'w' now"]),
    "smaller batches": (replace(SIGNATURE, max_batch_size=4), ["its batches are at most 4 now, 8 before"]),
    "no batches": (replace(SIGNATURE, max_batch_size=0), [
        "it has no batches now (max_batch_size: 8 before, 0 now)"]),
    "decoupled": (replace(SIGNATURE, decoupled=True), ["one request has any number of answers now (decoupled: true)"]),
    "several": (replace(SIGNATURE, max_batch_size=4, inputs=(X,)), [
        "its batches are at most 4 now, 8 before", "input 'y' is missing"]),
    "optional addition": (replace(SIGNATURE, inputs=(X, Y, replace(NEW, optional=True))), []),
    "further output": (replace(SIGNATURE, outputs=(Z, NEW)), []),
    "larger batches": (replace(SIGNATURE, max_batch_size=64), []),
    "nothing": (SIGNATURE, []),
}  # fmt: skip


@pytest.mark.parametrize("drift", DRIFTS)
def test_connecting_names_every_difference_that_matters_and_no_other(drift: str) -> None:
    served, differences = DRIFTS[drift]
    api = imported(module_code([StubModel(SIGNATURE, "1")], generated_by="1"))
    server = FakeServer()
    server.add_signature(served, lambda inputs: {})
    if not differences:
        assert api.Drifting.connect(server.client()).SIGNATURE.name == "drifting"
        return
    with pytest.raises(SignatureDrift, match="not the one that this client was generated for") as caught:
        api.Drifting.connect(server.client())
    assert list(caught.value.differences) == differences

    async def connect() -> None:
        async with server.async_client() as client:
            await api.AsyncDrifting.connect(client)

    with pytest.raises(SignatureDrift) as caught:
        asyncio.run(connect())
    assert list(caught.value.differences) == differences


NASTY = st.one_of(
    st.text(max_size=30),
    st.sampled_from(
        ['"""', "'''\nimport os\n", "\\", '\\"', "x\n    y", "class", "self", "np", "None", "a-b", "é", "\ud800", "\x00",
         "__init__", "__x", "1st", "", " ", "{x}", "%s", "# noqa", "from_result", "given_arrays", "\u202e", "\U0001f600"]
    ),
)  # fmt: skip


@given(NASTY)
def test_a_literal_is_the_text_and_nothing_more(text: str) -> None:
    assert ast.literal_eval(literal(text)) == text
    (docstring,) = ast.parse(f'"""A {docstring_text(text)}."""').body
    assert isinstance(docstring, ast.Expr)
    shown = text.encode("utf-8", "backslashreplace").decode()
    assert ast.literal_eval(docstring.value) == f"A {shown}."


@given(NASTY)
def test_an_identifier_is_one_and_shadows_nothing_of_the_method(text: str) -> None:
    identifier = identifier_from_name(text)
    assert identifier.isidentifier()
    assert identifier.isascii()
    assert identifier not in ("self", "np", "npt", "None", "class", "timeout_s")


@settings(max_examples=25)
@given(
    model=NASTY,
    inputs=st.lists(NASTY, min_size=1, max_size=4, unique_by=identifier_from_name),
    outputs=st.lists(NASTY, min_size=1, max_size=4, unique_by=identifier_from_name),
    label=NASTY,
    decoupled=st.booleans(),
)
def test_hostile_names_cannot_put_code_into_the_module(
    model: str, inputs: list[str], outputs: list[str], label: str, decoupled: bool
) -> None:
    metadata = ModelMetadata(
        model, ("1",), label,
        tuple(TensorMetadata(name, "INT64", (-1, 2), bool(index % 2)) for index, name in enumerate(inputs)),
        tuple(TensorMetadata(name, "FP32", (-1, 2)) for name in outputs), 4, decoupled,
    )  # fmt: skip
    stub = StubModel(metadata, label, label, {outputs[0]: (label,)})
    code = module_code([stub], generated_by=label)
    top = [type(node).__name__ for node in ast.parse(code).body]
    assert set(top) == {"Expr", "ImportFrom", "Import", "ClassDef"}
    assert (top.count("Expr"), top.count("ClassDef")) == (1, 3)
    api = imported(code)
    signature = getattr(api, class_names([stub])[model]).SIGNATURE
    assert signature == replace(metadata, versions=())


def test_the_layout_of_hostile_modules_is_stable(tmp_path: Path) -> None:
    names = ['a"""', "b\\", "c\ny", "class", "d" + "é" * 9, "e-b", "n" * 50, "f'"]
    tensors = tuple(TensorMetadata(name, "FP32", (-1, *range(12))) for name in names)
    metadata = ModelMetadata("''\n", (), "", tensors, tensors, 4, decoupled=False)
    (tmp_path / "api.py").write_text(module_code([StubModel(metadata, "1")], generated_by="1"))
    done = subprocess.run(
        [sys.executable, "-m", "ruff", "format", "--isolated", "--no-cache", "--diff", "api.py"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout


def test_names_that_become_one_are_refused(models: dict[str, StubModel]) -> None:
    tensors = (TensorMetadata("a-b", "FP32", (1,)), TensorMetadata("a.b", "FP32", (1,)))
    metadata = ModelMetadata("m", (), "", tensors, tensors[:1], 0, decoupled=False)
    with pytest.raises(SourceError, match=r"inputs of model 'm'.*identifier in Python: 'a-b', 'a.b' \(a_b\)"):
        module_code([StubModel(metadata, "1")], generated_by="1")
    stubs = [StubModel(replace(SIGNATURE, name=name), "1") for name in ("a-b", "async-a-b")]
    with pytest.raises(SourceError, match="would have the same class"):
        module_code(stubs, generated_by="1")
    with pytest.raises(SourceError, match="named twice: llmapi"):
        module_code([models["llmapi"]] * 2, generated_by="1")


def test_a_datatype_that_numpy_has_not_is_refused() -> None:
    metadata = replace(SIGNATURE, inputs=(TensorMetadata("x", "FP8", (-1, 1)),))
    with pytest.raises(SourceError, match="'x' of model 'drifting' is FP8, which has no numpy type"):
        module_code([StubModel(metadata, "1")], generated_by="1")


def run(*arguments: str) -> int:
    return cli.run(["client-stub", *arguments])


def test_the_verb_writes_checks_and_tells(
    repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, where = tmp_path / "api.py", ("--repository", str(repository))
    assert run("smollm2-int4", "plain-1", *where, "-o", str(file), "--check") == 1
    assert "does not exist" in capsys.readouterr().err
    assert run("smollm2-int4", "plain-1", *where, "-o", str(file)) == 0
    assert "wrote" in capsys.readouterr().err
    assert run("smollm2-int4", "plain-1", *where, "-o", str(file), "--check") == 0
    assert "is current" in capsys.readouterr().err
    assert run("smollm2-int4", "plain-1", *where) == 0
    assert capsys.readouterr().out == file.read_text()
    file.write_text(file.read_text().replace("Generated by enginesmith ", "Generated by enginesmith 9"))
    assert run("smollm2-int4", "plain-1", *where, "-o", str(file), "--check") == 0
    file.write_text(file.read_text().replace("INT64", "INT32"))
    capsys.readouterr()
    assert run("smollm2-int4", "plain-1", *where, "-o", str(file), "--check", "--json") == 1
    document = json.loads(capsys.readouterr().out)
    assert document["current"] is False
    assert any("INT32" in line for line in document["differences"])
    assert document["models"][1] == {
        "model": "plain-1", "version": "2", "digest": DIGEST, "class": "Plain1", "async_class": "AsyncPlain1",
        "methods": ["infer"],
    }  # fmt: skip


@pytest.mark.parametrize("name", ["nope", "../repository", ".", ""])
def test_a_model_that_is_not_published_is_refused_with_those_that_are(
    repository: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    assert run(name, "--repository", str(repository)) == 1
    assert "models there: llmapi, moods-text, pieces, plain-1" in capsys.readouterr().err


def test_checking_nothing_and_writing_nowhere_are_refused(
    repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("llmapi", "--repository", str(repository), "--check") == 2
    assert "--check compares a file" in capsys.readouterr().err
    assert run("llmapi", "--repository", str(repository), "-o", str(tmp_path / "no" / "api.py")) == 1
    assert "cannot write" in capsys.readouterr().err


def test_a_server_that_is_not_there_is_an_operators_matter(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("m", "--server", "grpc://127.0.0.1:1", "--timeout", "0.5") == 1
    assert "error: " in capsys.readouterr().err
