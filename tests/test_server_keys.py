"""Who is let in: keys, what is open without one, and pages of other origins."""

import asyncio
import hashlib
import json
from pathlib import Path

import pytest
from quart import Quart, g
from werkzeug.datastructures import Headers

from refimpl.errors import InvalidRequestError
from refimpl.server import cors, errors, keys
from refimpl.server.errors import Problem
from refimpl.server.keys import Keyring, digest_of, new_key, read_keys

ALICE, BOB = "sk-alice", "sk-bob"


def keyring_of(tmp_path: Path, text: str, *, plain: str = "") -> Keyring:
    path = tmp_path / "keys.toml"
    path.write_text(text, encoding="utf-8")
    return read_keys(path, plain=plain)


def entry(name: str, key: str, more: str = "") -> str:
    return f'[[keys]]\nname = "{name}"\nsha256 = "{digest_of(key)}"\n{more}\n'


def app_of(keyring: Keyring, *, origins: tuple[str, ...] = ()) -> Quart:
    app = Quart(__name__)
    errors.register(app)
    cors.install(app, origins)
    keys.install(app, keyring)

    async def name() -> str:
        return "everybody" if g.key is None else g.key.name

    for path in ("/health", "/ready", "/metrics", "/v1/models"):
        app.add_url_rule(path, path, name)
    return app


@pytest.fixture
def guarded() -> Quart:
    return app_of(read_keys(plain=f"{ALICE},{BOB}"))


# Reading keys.


def test_keys_of_a_file_have_names_and_limits(tmp_path):
    limits = "requests_per_minute = 2\ntokens_per_minute = 30\nconcurrency = 1"
    keyring = keyring_of(tmp_path, entry("alice", ALICE, limits) + entry("bob", BOB))
    alice, bob = keyring.keys
    assert (alice.name, bob.name) == ("alice", "bob")
    assert alice.digest == hashlib.sha256(ALICE.encode()).digest()
    assert alice.budget.headers()["x-ratelimit-limit-requests"] == "2"
    assert alice.budget.headers()["x-ratelimit-limit-tokens"] == "30"
    assert bob.budget.headers() == {}


def test_keys_of_a_variable_come_after_those_of_the_file(tmp_path):
    keyring = keyring_of(tmp_path, entry("alice", ALICE), plain=" sk-1 ,,sk-2")
    assert [key.name for key in keyring.keys] == ["alice", "key-1", "key-2"]
    assert not read_keys(plain=" , ")


def test_nothing_of_a_keyring_shows_a_key():
    keyring = read_keys(plain=ALICE)
    assert ALICE not in repr(keyring.keys) + repr(vars(keyring.keys[0]))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("keys = []", r"keys: .*at least 1"),
        ("", r"keys\.toml: keys: field required"),
        (f'[[keys]]\nname = "a"\nsha256 = "{ALICE}"', r"keys\.0\.sha256: string should match"),
        (f'[[keys]]\nname = "a b"\nsha256 = "{digest_of(ALICE)}"', r"keys\.0\.name: "),
        (entry("a", ALICE, "requests_per_minute = 0"), r"keys\.0\.requests_per_minute: "),
        (entry("a", ALICE, "tokens_per_minute = true"), r"keys\.0\.tokens_per_minute: "),
        (entry("a", ALICE, "requests = 5"), r"keys\.0\.requests: extra inputs"),
        (entry("a", ALICE) + entry("a", BOB), r"two API keys have the name a"),
        (entry("a", ALICE) + entry("b", ALICE), r"two API keys have the sha256 "),
        ("keys = = 1", r"is not TOML"),
    ],
)
def test_a_file_of_keys_is_refused_by_place_without_showing_what_it_holds(tmp_path, text, said):
    with pytest.raises(InvalidRequestError, match=said) as caught:
        keyring_of(tmp_path, text)
    assert ALICE not in str(caught.value)
    assert caught.value.parameter == "api_keys"


def test_a_file_of_keys_that_is_not_there(tmp_path):
    with pytest.raises(InvalidRequestError, match=r"cannot read the API keys .*No such file"):
        read_keys(tmp_path / "gone.toml")


def test_new_keys_differ_and_are_long():
    made = {new_key() for _ in range(100)}
    assert len(made) == 100
    assert all(key.startswith("sk-") and len(key) == 46 for key in made)


# Finding the key of a request.


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER", "bEaReR"])
def test_the_scheme_may_be_spelt_in_any_case(scheme):
    keyring = read_keys(plain=f"{ALICE},{BOB}")
    found = keyring.find(f"{scheme}   {BOB}  ")
    assert found is keyring.keys[1]


@pytest.mark.parametrize(
    "header",
    [None, "", " ", "Bearer", "Bearer ", "bearer\t", ALICE, f"Basic {ALICE}", "Bearer\x00"],
)
def test_a_key_that_is_missing(header):
    with pytest.raises(Problem, match="didn't provide an API key") as caught:
        read_keys(plain=ALICE).find(header)
    problem = caught.value
    assert (problem.status, problem.type, problem.param, problem.code) == (
        401, "invalid_request_error", None, None,
    )  # fmt: skip
    assert problem.headers == {"WWW-Authenticate": "Bearer"}


@pytest.mark.parametrize(
    "key", ["sk-alicf", "sk-alic", "sk-alicee", "SK-ALICE", "sk-älice", "é" * 10_000, "☃", "a b"]
)
def test_a_key_that_is_wrong(key):
    with pytest.raises(Problem, match="Incorrect API key") as caught:
        read_keys(plain=ALICE).find(f"Bearer {key}")
    problem = caught.value
    assert (problem.status, problem.code) == (401, "invalid_api_key")
    assert key not in problem.message
    assert problem.headers == {"WWW-Authenticate": "Bearer"}


@pytest.mark.parametrize("header", [None, "", "Bearer ", "Bearer x", "Basic x", "\x00"])
def test_without_keys_everybody_is_let_in(header):
    assert Keyring().find(header) is None


# The guard.


def answer(app: Quart, method: str, path: str, **headers: str) -> tuple[int, Headers, bytes]:
    async def sent() -> tuple[int, Headers, bytes]:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        client = app.test_client()
        response = await client.open(  # pyright: ignore[reportCallIssue]
            path, method=method, headers=named
        )
        return response.status_code, response.headers, await response.get_data(as_text=False)

    return asyncio.run(asyncio.wait_for(sent(), 10))


@pytest.mark.parametrize("path", ["/health", "/ready"])
def test_probes_need_no_key(guarded, path):
    assert answer(guarded, "GET", path)[0] == 200
    # With a slash more it is open, too, though there is nothing there in this app.
    assert answer(guarded, "GET", path + "/")[0] == 404


@pytest.mark.parametrize("path", ["/metrics", "/v1/models", "/", "/v1/unknown", "/healthy", "//"])
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
def test_everything_else_needs_one_also_what_is_not_there(guarded, method, path):
    status, headers, body = answer(guarded, method, path)
    assert (status, headers["WWW-Authenticate"]) == (401, "Bearer")
    assert json.loads(body)["error"]["code"] is None
    assert "Allow" not in headers
    assert answer(guarded, method, path, Authorization="Bearer no")[0] == 401
    assert answer(guarded, method, path, Authorization=f"Bearer {BOB}")[0] != 401


def test_the_key_of_a_request_is_known_by_name(guarded):
    assert answer(guarded, "GET", "/v1/models", Authorization=f"bearer {BOB}")[2] == b"key-2"
    assert answer(app_of(Keyring()), "GET", "/v1/models", Authorization="Bearer ")[2] == (
        b"everybody"
    )


def test_replies_say_what_is_left_of_the_key(tmp_path):
    app = app_of(keyring_of(tmp_path, entry("alice", ALICE, "requests_per_minute = 60")))
    _, headers, _ = answer(app, "GET", "/v1/models", Authorization=f"Bearer {ALICE}")
    assert headers["x-ratelimit-limit-requests"] == "60"
    assert headers["x-ratelimit-remaining-requests"] == "60"
    assert headers["x-ratelimit-reset-requests"] == "0s"
    assert "x-ratelimit-limit-requests" not in answer(app, "GET", "/health")[1]


# Other origins.

PREFLIGHT = {"Origin": "https://page.example", "Access_Control_Request_Method": "POST"}


def cors_headers(headers: Headers) -> dict[str, str]:
    lower = {name.lower(): value for name, value in headers.items()}
    return {name: value for name, value in lower.items() if name.startswith("access-control")}


@pytest.mark.parametrize("path", ["/v1/models", "/v1/unknown"])
def test_a_preflight_needs_no_key_and_is_told_nothing(guarded, path):
    status, headers, body = answer(guarded, "OPTIONS", path, **PREFLIGHT)
    assert (status, body) == (204, b"")
    assert {name.lower() for name, _ in headers} <= {"content-type", "content-length"}
    # One without a method asked for is no preflight.
    assert answer(guarded, "OPTIONS", path, Origin="https://page.example")[0] == 401


def test_without_origins_no_reply_speaks_of_any():
    status, headers, _ = answer(app_of(Keyring()), "GET", "/v1/models", Origin="https://a.example")
    assert (status, cors_headers(headers)) == (200, {})


def test_an_origin_that_is_allowed():
    app = app_of(read_keys(plain=ALICE), origins=("https://page.example",))
    status, headers, _ = answer(
        app, "OPTIONS", "/v1/models", Access_Control_Request_Headers="authorization", **PREFLIGHT
    )
    assert status == 204
    assert cors_headers(headers) == {
        "access-control-allow-origin": "https://page.example",
        "access-control-allow-methods": "GET, POST",
        "access-control-allow-headers": "authorization",
        "access-control-max-age": "600",
    }
    assert headers["Vary"] == "Origin"
    authorized = {"Authorization": f"Bearer {ALICE}", "Origin": "https://page.example"}
    _, headers, _ = answer(app, "GET", "/v1/models", **authorized)
    assert headers["Access-Control-Allow-Origin"] == "https://page.example"
    assert "x-request-id" in headers["Access-Control-Expose-Headers"]
    assert "Access-Control-Allow-Credentials" not in headers
    # An error can be read there, too.
    _, headers, _ = answer(app, "GET", "/v1/models", Origin="https://page.example")
    assert headers["Access-Control-Allow-Origin"] == "https://page.example"


@pytest.mark.parametrize(
    "origin", ["https://other.example", "https://page.example.evil", "null", "http://page.example"]
)
def test_an_origin_that_is_not_allowed(origin):
    app = app_of(Keyring(), origins=("https://page.example",))
    preflight = {**PREFLIGHT, "Origin": origin}
    assert cors_headers(answer(app, "OPTIONS", "/v1/models", **preflight)[1]) == {}
    assert cors_headers(answer(app, "GET", "/v1/models", Origin=origin)[1]) == {}


def test_any_origin():
    app = app_of(Keyring(), origins=("*",))
    _, headers, _ = answer(app, "GET", "/v1/models", Origin="https://other.example")
    assert headers["Access-Control-Allow-Origin"] == "*"
