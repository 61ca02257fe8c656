"""What a server is set to: the names, the units, the limits and the defaults of its settings.

Owns the schema. Where values come from - flags, environment, a file - is in `sources`.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(ge=1)]
Number = Annotated[int, Field(ge=0)]
# A day is longer than anybody means, and far from what clocks and sockets overflow at.
Seconds = Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)]


class ServerSettings(BaseModel):
    """Everything that can be set. Sizes are in bytes and times in seconds.

    A description is one sentence, and is the help of the flag, too.
    """

    # Defaults are validated too, so that a field never holds what its type does not allow.
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    model: str | None = Field(
        default=None,
        description="A name that `refimpl models` lists, a Hub id, a .gguf file or a checkpoint "
        "folder; by default the embedded Gemma 3 270M.",
    )
    aliases: tuple[str, ...] = Field(
        default=(), description="Further names that requests may call the model by."
    )
    numerics: Literal["float32", "hf_bfloat16", "deepmind_bfloat16"] = Field(
        default="float32", description="Where the forward pass rounds."
    )
    slots: Count = Field(default=8, description="Choices that are generated at the same time.")
    context: Count | None = Field(
        default=None,
        description="Most tokens of prompt and completion together; by default the smaller of the "
        "model's context and 4096.",
    )
    steps: Count = Field(
        default=1, description="Most decode steps in one call of the device while nobody waits."
    )
    prefix_bytes: Number = Field(
        default=64 << 20,
        description="Memory for beginnings of prompts that may come again; 0 for none. The default "
        "holds 1,792 tokens of Gemma 3 270M in float32, but 128 of 4B: give larger models more.",
    )

    host: str = Field(default="127.0.0.1", min_length=1, description="Address to listen on.")
    port: int = Field(
        default=8000, ge=0, le=65_535, description="Port to listen on; 0 for any free one."
    )
    tls_certificate: Path | None = Field(
        default=None, description="PEM file with the certificate chain; turns TLS on."
    )
    tls_key: Path | None = Field(
        default=None, description="PEM file with the certificate's private key."
    )
    cors_origins: tuple[str, ...] = Field(
        default=(), description="Origins whose web pages may call the server; * for all."
    )

    api_keys: Path | None = Field(
        default=None, description="TOML file with the keys that are let in, as hashes."
    )
    allow_unauthenticated: bool = Field(
        default=False,
        description="Listen on an address that others can reach though there are no keys.",
    )

    max_body_bytes: Count = Field(
        default=2 << 20, description="Longest body of a request, in bytes."
    )
    body_timeout: Seconds = Field(
        default=60.0, description="Seconds that a body may take to arrive."
    )
    request_timeout: Seconds = Field(
        default=600.0, description="Seconds after which a request ends, finished or not."
    )
    drain_seconds: float = Field(
        default=30.0,
        ge=0,
        le=86_400,
        allow_inf_nan=False,
        description="Seconds that running requests have to end once the server is to stop.",
    )
    max_queue: Count = Field(default=256, description="Most choices that run or wait at one time.")
    max_prompts: Count = Field(default=128, description="Most prompts in one request.")
    max_candidates: Count = Field(
        default=128, description="Most candidates in one request: prompts times best_of or n."
    )
    max_tokens_total: Count = Field(
        default=1 << 20,
        description="Most tokens that a request may ask for: candidates times max_tokens.",
    )
    max_stop: Count = Field(default=4, description="Most stop strings in one request.")
    max_stop_length: Count = Field(default=256, description="Longest stop string, in characters.")
    max_logit_bias: Count = Field(default=300, description="Most entries of logit_bias.")
    max_json_depth: Count = Field(default=16, description="Deepest nesting of a request's JSON.")
    max_logprobs: int = Field(
        default=5,
        ge=0,
        le=20,
        description="Most likeliest tokens that a request may ask for at each place.",
    )
    max_user_length: Count = Field(default=256, description="Longest `user`, in characters.")
    require_model: bool = Field(
        default=True,
        description="Refuse a completion that names no model; if not, it is for the one served.",
    )
    unknown_fields: Literal["reject", "ignore"] = Field(
        default="reject", description="What becomes of a request with fields that nobody knows."
    )
    list_end_of_text: bool = Field(
        default=True, description="List the token that ends a text among its log-probabilities."
    )
    infill_candidates: int = Field(
        default=8, ge=1, le=128, description="Middles that are drawn for each choice with a suffix."
    )
    infill_cuts: Count = Field(
        default=4, description="Places at which each of these middles may be cut off."
    )
    infill_suffix_tokens: Count = Field(default=512, description="Longest suffix, in tokens.")

    log_format: Literal["text", "json"] = Field(
        default="text", description="How a line of the access log is spelt."
    )
