"""Routes, headers and errors of the app; most of it needs no engine."""

import asyncio
import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Any

import pytest
from pydantic import TypeAdapter

from refimpl.server.app import create_app
from refimpl.server.contract import CompletionRequest
from refimpl.server.errors import Problem, dumps
from refimpl.server.extensions import Extensions
from refimpl.server.lifecycle import Service
from refimpl.server.loading import Loaded
from refimpl.server.models import Model, ModelList
from refimpl.server.openapi import document
from refimpl.server.operations import OPERATIONS
from refimpl.server.settings import ServerSettings
from tests.servers import (
    FINGERPRINT,
    MODEL,
    NAMES,
    SLOTS,
    Client,
    Got,
    client_of,
    started,
    tiny_client,
)


def nothing_loads(progress: Any) -> Loaded:
    raise RuntimeError("a secret of the loader")


@pytest.fixture(scope="module")
def loading() -> Client:
    """Of a server that has yet to begin to load."""
    service = Service(ServerSettings(), names=NAMES, load=nothing_loads)
    return Client(create_app(service), service)


@pytest.fixture(scope="module")
def failed() -> Client:
    service = started(ServerSettings(), load=nothing_loads)
    return Client(create_app(service), service)


@pytest.fixture(scope="module")
def ready() -> Iterator[Client]:
    with tiny_client() as client:
        yield client


def check_error(got: Got, status: int, *, code: str | None = None) -> None:
    assert got.status == status
    assert got.headers["Content-Type"] == "application/json"
    assert got.error["code"] == code
    assert got.error["message"]


@pytest.mark.parametrize(
    ("method", "path", "message"),
    [
        ("GET", "/", "Invalid URL (GET /)"),
        ("GET", "/v1/x", "Invalid URL (GET /v1/x)"),
        ("POST", "/v1//completions", "Invalid URL (POST /v1//completions)"),
        ("POST", "/v1/chat/completions", "Invalid URL (POST /v1/chat/completions)"),
        ("GET", "/static/x", "Invalid URL (GET /static/x)"),
    ],
)
def test_paths_that_are_none(loading, method, path, message):
    got = loading.send(method, path, b"", {})
    check_error(got, 404)
    assert got.error["message"] == message


def test_other_methods(loading):
    for method in ("GET", "PUT", "DELETE", "PATCH"):
        got = loading.send(method, "/v1/completions", b"", {})
        check_error(got, 405, code="method_not_supported")
        assert got.error["message"] == "Only POST requests are accepted."
        assert set(got.headers["Allow"].split(", ")) == {"OPTIONS", "POST"}
    got = loading.send("POST", "/v1/models", b"", {})
    check_error(got, 405, code="method_not_supported")
    assert got.error["message"].startswith("Not allowed to POST on /v1/models (HINT: ")
    assert set(got.headers["Allow"].split(", ")) == {"GET", "HEAD", "OPTIONS"}


@pytest.mark.parametrize("kind", ["text/plain", "", "application/x-www-form-urlencoded"])
def test_a_body_that_is_not_sent_as_json(loading, kind):
    body = json.dumps({"model": MODEL}).encode()
    check_error(loading.send("POST", "/v1/completions", body, {"Content-Type": kind}), 400)


def test_parameters_of_the_content_type_do_not_matter(loading):
    kind = {"Content-Type": "application/json; charset=utf-8"}
    got = loading.send("POST", "/v1/completions", b'{"n": 0}', kind)
    assert got.error["param"] == "model"


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b'{"a": NaN}', b"[" * 100, b"\xff"])
def test_a_body_that_is_no_json(loading, body):
    for path in ("/v1/completions", "/tokenize", "/detokenize"):
        check_error(loading.send("POST", path, body, {"Content-Type": "application/json"}), 400)


def test_a_body_that_is_too_large(loading):
    kind = {"Content-Type": "application/json"}
    body = b'"' + b"a" * (2 << 20) + b'"'
    check_error(loading.send("POST", "/v1/completions", body, kind), 413, code="request_too_large")


def test_a_body_that_does_not_arrive():
    service = Service(ServerSettings(body_timeout=0.05), names=NAMES, load=nothing_loads)
    app = create_app(service)

    async def scene() -> Got:
        connection = app.test_client().request(
            "/v1/completions", method="POST", headers={"Content-Type": "application/json"}
        )
        async with connection as sent:
            await sent.send(b'{"model": ')
        response = await connection.as_response()
        body = await response.get_data(as_text=False)
        return Got(response.status_code, response.headers, body)

    got = asyncio.run(asyncio.wait_for(scene(), 20))
    check_error(got, 408)
    assert got.error["type"] == "timeout"


def test_what_nobody_foresaw_is_a_500_without_a_word_of_it(loading, monkeypatch):
    def breaks() -> bytes:
        raise RuntimeError("a secret in /some/path")

    monkeypatch.setattr(loading.service.metrics, "render", breaks)
    got = loading.get("/metrics")
    check_error(got, 500)
    assert got.error["type"] == "server_error"
    assert b"secret" not in got.body
    assert b"path" not in got.body


def test_ids_of_requests(loading):
    made = loading.get("/version").headers["x-request-id"]
    assert re.fullmatch(r"req_[0-9a-f]{32}", made)
    assert loading.get("/version").headers["x-request-id"] != made
    own = loading.get("/nope", headers={"X-Request-Id": "mine/1.2:3"})
    assert own.headers["x-request-id"] == "mine/1.2:3"
    for harmful in ("a b", "x" * 129, "a\tb", "é", '"'):
        got = loading.get("/version", headers={"X-Request-Id": harmful})
        assert got.headers["x-request-id"].startswith("req_")


def test_headers_of_every_reply(loading):
    for got in (loading.get("/version"), loading.get("/nope"), loading.complete(prompt="a")):
        assert int(got.headers["openai-processing-ms"]) >= 0
        assert got.headers["openai-version"] == "2020-10-01"
        assert got.headers["access-control-expose-headers"] == "X-Request-ID"


def test_probes_of_each_state(loading, failed, ready):
    for path in ("/health", "/health/"):
        assert loading.get(path).json == {"status": "ok"}
        assert ready.get(path).json == {"status": "ok"}
        check_error(failed.get(path), 503, code="failed")
    check_error(loading.get("/ready"), 503, code="model_loading")
    assert loading.get("/ready").headers["Retry-After"] == "5"
    check_error(failed.get("/ready"), 503, code="failed")
    assert ready.get("/ready/").json == {"status": "ok"}
    for client in (loading, failed, ready):
        assert re.fullmatch(r"\d+\.\d+\.\d+", client.get("/version").json["version"])
        assert client.get("/metrics").status == 200


def test_completions_of_a_server_that_is_not_ready(loading, failed):
    got = loading.complete(prompt="a")
    check_error(got, 503, code="model_loading")
    assert int(got.headers["Retry-After"]) >= 1
    check_error(failed.complete(prompt="a"), 503, code="failed")
    assert b"secret" not in failed.complete(prompt="a").body
    # What is wrong is wrong before the model is there, too.
    check_error(loading.complete(prompt="a", n=0), 400)
    check_error(loading.complete(model="other"), 404, code="model_not_found")
    check_error(loading.post("/tokenize", {"prompt": "a"}), 503, code="model_loading")


def test_completions_of_a_server_that_is_ending(ready):
    service = client_of(ready.service.engine).service
    client = Client(create_app(service), service)
    service.drain()
    check_error(client.complete(prompt="a"), 503, code="shutting_down")
    check_error(client.get("/ready"), 503, code="shutting_down")
    assert client.get("/health").status == 200


def test_models(ready):
    listed = ready.get("/v1/models").json
    TypeAdapter(ModelList).validate_python(listed, strict=True)
    assert [model["id"] for model in listed["data"]] == list(NAMES)
    for name in NAMES:
        model = ready.get(f"/v1/models/{name}").json
        assert ready.get(f"/v1/models/{name}/").json == model
        TypeAdapter(Model).validate_python(model, strict=True)
        assert model["id"] == name
        told = model["capabilities"]
        assert (told["context_length"], told["vocabulary_size"]) == (384, 512)
        assert told["slots"] == SLOTS
        assert (told["max_logprobs"], told["suffix"]) == (5, "resampling")
        assert (told["numerics"], told["system_fingerprint"]) == ("float32", FINGERPRINT)
        assert told["limits"]["stop"] == 4
    check_error(ready.get("/v1/models/google/other"), 404, code="model_not_found")


def test_every_route_is_described_and_every_description_is_routed(ready):
    described = ready.get("/openapi.json").json
    rules = {
        (method, re.sub(r"<path:(\w+)>", r"{\1}", rule.rule))
        for rule in ready.app.url_map.iter_rules()
        for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}
    }
    paths = {
        (method.upper(), path)
        for path, operations in described["paths"].items()
        for method in operations
    }
    assert rules == paths == {(each.method, each.path) for each in OPERATIONS}


def test_every_reference_of_the_description_leads_somewhere(ready):
    described = ready.get("/openapi.json").json
    schemas = described["components"]["schemas"]
    names = set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(described)))
    assert names <= set(schemas)
    assert set(schemas) <= names
    assert described["openapi"] == "3.1.0"


def test_the_description_of_requests_is_the_schema_that_reads_them(ready):
    properties = ready.get("/openapi.json").json["components"]["schemas"]["CompletionRequest"]
    assert properties["additionalProperties"] is False
    assert properties["required"] == ["model"]
    assert set(properties["properties"]) == set(CompletionRequest.model_fields)
    for name, field in properties["properties"].items():
        assert ("anyOf" in field and {"type": "null"} in field["anyOf"]) == (name != "model"), name
        is_ours = field["description"].endswith("Not of OpenAI's contract.")
        assert is_ours == (name in Extensions.model_fields), name


def test_caps_of_the_settings_are_described():
    settings = ServerSettings(max_stop=7, max_stop_length=9, max_logprobs=11, max_user_length=13)
    fields = document(settings)["components"]["schemas"]["CompletionRequest"]["properties"]
    assert fields["logprobs"]["anyOf"][0]["maximum"] == 11
    assert fields["prompt_logprobs"]["anyOf"][0]["maximum"] == 11
    assert fields["user"]["anyOf"][0]["maxLength"] == 13
    text, texts, null = fields["stop"]["anyOf"]
    assert (text["maxLength"], text["minLength"], texts["maxItems"]) == (9, 1, 7)
    assert texts["items"] == {"type": "string", "minLength": 1, "maxLength": 9}
    assert null == {"type": "null"}


class Links(HTMLParser):
    """Everything in a page that a browser would fetch or run."""

    def __init__(self) -> None:
        super().__init__()
        self.found = list[str]()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = {name for name, _ in attrs} & {"src", "href", "srcset", "action", "data"}
        if names or tag in ("script", "link", "iframe", "object", "embed"):
            self.found.append(tag)


def test_the_page_of_docs_has_every_field_and_nothing_from_outside(ready):
    got = ready.get("/docs")
    assert got.headers["Content-Type"] == "text/html; charset=utf-8"
    assert got.headers["Content-Security-Policy"].startswith("default-src 'none'")
    text = got.body.decode()
    for name in CompletionRequest.model_fields:
        assert f"<code>{name}</code>" in text
    for operation in OPERATIONS:
        assert f"<code>{operation.method} {operation.path}</code>" in text
    links = Links()
    links.feed(text)
    assert links.found == []
    assert "http" not in text


def test_a_problem_is_bounded():
    problem = Problem(400, "x" * 5000, param="y" * 5000)
    assert len(problem.to_json()["error"]["message"] or "") == 1000
    assert len(problem.to_json()["error"]["param"] or "") == 100


def test_json_is_ascii_on_one_line_and_never_nan():
    assert dumps({"a": "\u2028é🙂\n"}) == '{"a":"\\u2028\\u00e9\\ud83d\\ude42\\n"}'
    with pytest.raises(ValueError, match="not JSON compliant"):
        dumps(float("nan"))
