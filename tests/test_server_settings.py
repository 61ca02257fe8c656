"""Settings: which source wins, what is refused, and how they are shown."""

import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refimpl.errors import InvalidRequestError
from refimpl.server.settings import ServerSettings
from refimpl.server.sources import FIELDS, VARIABLES, Resolved, resolve


def resolved(
    tmp_path: Path | None = None,
    *,
    toml: str | None = None,
    environment: dict[str, str] | None = None,
    **flags: object,
) -> Resolved:
    config = None
    if toml is not None:
        assert tmp_path is not None
        config = tmp_path / "refimpl.toml"
        config.write_text(toml, encoding="utf-8")
    return resolve(flags, environment=environment or {}, config=config)


def test_nothing_given_is_all_defaults():
    found = resolved()
    assert found.settings == ServerSettings()
    assert set(found.origins.values()) == {"default"}
    assert (found.settings.slots, found.settings.port, found.settings.max_queue) == (8, 8000, 256)


def test_flags_win_over_environment_over_file_over_defaults(tmp_path):
    found = resolved(
        tmp_path,
        toml="slots = 2\nport = 2\nmax_queue = 2\n",
        environment={"REFIMPL_SLOTS": "3", "REFIMPL_PORT": "3"},
        slots=4,
    )
    settings = found.settings
    assert (settings.slots, settings.port, settings.max_queue, settings.steps) == (4, 3, 2, 1)
    assert [found.origins[name] for name in ("slots", "port", "max_queue", "steps")] == [
        "--slots", "REFIMPL_PORT", str(tmp_path / "refimpl.toml"), "default",
    ]  # fmt: skip


def test_a_flag_may_bring_a_setting_back_to_its_default(tmp_path):
    found = resolved(tmp_path, toml="slots = 2", slots=8)
    assert (found.settings.slots, found.origins["slots"]) == (8, "--slots")


def test_the_file_may_be_named_by_a_variable_and_a_flag_goes_before(tmp_path):
    by_variable = tmp_path / "variable.toml"
    by_variable.write_text("slots = 5", encoding="utf-8")
    environment = {"REFIMPL_CONFIG": str(by_variable)}
    assert resolved(environment=environment).settings.slots == 5
    assert resolved(tmp_path, toml="slots = 6", environment=environment).settings.slots == 6


def test_every_setting_has_a_variable_of_its_own():
    assert len(set(VARIABLES.values())) == len(FIELDS)
    assert VARIABLES["max_queue"] == "REFIMPL_MAX_QUEUE"
    # REFIMPL_API_KEYS holds keys, not the name of a file.
    assert VARIABLES["api_keys"] == "REFIMPL_API_KEYS_FILE"


def test_lists_are_spelt_with_commas_in_a_variable_and_as_arrays_in_a_file(tmp_path):
    by_variable = resolved(environment={"REFIMPL_ALIASES": "tea, gemma:tea"})
    by_file = resolved(tmp_path, toml='aliases = ["tea", "gemma:tea"]')
    assert by_variable.settings.aliases == by_file.settings.aliases == ("tea", "gemma:tea")


def test_an_empty_variable_is_none():
    assert resolved(environment={"REFIMPL_SLOTS": ""}).settings.slots == 8


def test_variables_that_are_no_settings_are_named():
    environment = {
        "REFIMPL_MAX_QUEU": "9", "REFIMPL_CACHE_DIR": "x", "REFIMPL_API_KEYS": "y", "HOME": "z",
    }  # fmt: skip
    assert resolved(environment=environment).strangers == ("REFIMPL_MAX_QUEU",)


@pytest.mark.parametrize(
    ("toml", "said"),
    [
        ("slot = 3", r"refimpl\.toml: slot: there is no such setting; did you mean slots\?"),
        ("[server]\nslots = 3", r"refimpl\.toml: server: there is no such setting"),
        ('slots = "3"', r"refimpl\.toml: slots: .*valid integer, got '3'"),
        ("slots = true", r"refimpl\.toml: slots: .*valid integer, got True"),
        ("slots = 0", r"refimpl\.toml: slots: .*greater than or equal to 1, got 0"),
        ("body_timeout = inf", r"refimpl\.toml: body_timeout: "),
        ("body_timeout = nan", r"refimpl\.toml: body_timeout: "),
        ('unknown_fields = "maybe"', r"unknown_fields: .*'reject' or 'ignore', got 'maybe'"),
        ("slots = = 3", r"refimpl\.toml is not TOML: "),
        ("slots = 2020-01-01", r"slots: .*valid integer"),
    ],
)
def test_a_file_is_refused_by_name(tmp_path, toml, said):
    with pytest.raises(InvalidRequestError, match=said):
        resolved(tmp_path, toml=toml)


def test_flags_and_variables_are_refused_by_name():
    with pytest.raises(InvalidRequestError, match=r"^REFIMPL_SLOTS: .*valid integer.*got 'many'"):
        resolved(environment={"REFIMPL_SLOTS": "many"})
    with pytest.raises(InvalidRequestError, match=r"^--max-queue: .*equal to 1, got 0$"):
        resolved(max_queue=0)


def test_a_file_that_is_not_there_or_is_no_text(tmp_path):
    with pytest.raises(InvalidRequestError, match=r"cannot read .*gone\.toml: No such file"):
        resolve({}, environment={}, config=tmp_path / "gone.toml")
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(InvalidRequestError, match=r"bytes\.toml is not TOML"):
        resolve({}, environment={}, config=tmp_path / "bytes.toml")


NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)


@given(
    aliases=st.lists(NAMES, max_size=3),
    model=st.none() | NAMES,
    seconds=st.floats(0, 86_400, exclude_min=True),
    slots=st.integers(1, 1000),
    lists_end=st.booleans(),
)
def test_what_is_shown_is_a_configuration_file(aliases, model, seconds, slots, lists_end):
    settings = ServerSettings(
        aliases=tuple(aliases),
        model=model,
        request_timeout=seconds,
        slots=slots,
        list_end_of_text=lists_end,
        api_keys=Path("keys.toml"),
    )
    shown = Resolved(settings=settings, origins=dict.fromkeys(FIELDS, "default")).to_toml()
    table = tomllib.loads(shown)
    assert ServerSettings.model_validate(table) == settings
    # What has no value stands there too, as a comment.
    assert shown.count("\n") == len(FIELDS) - 1
