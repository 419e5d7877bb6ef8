"""What users read about the verbs: one text for the four Polars types, and the signature passed on."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from polars_llm.frame import embeddings, verbs

__all__ = ["documented", "estimated"]

F = TypeVar("F", bound=Callable[..., Any])

_VERB = """{task} {gives}.

        The distinct prompts that have no answer yet become one offline batch job, at half price.
        {when} Evaluating the same again resumes: what was sent is never sent twice, what was answered
        comes from the cache.

        Parameters
        ----------
        {first}
            {prompt}{more}{own}
        model
            ``"openai/NAME"``, or a model object such as ``pllm.OpenAI("NAME")``. Default:
            ``pllm.Config(model=...)``, then the environment variable ``POLARS_LLM_MODEL``.
        system
            System prompt: text, or an expression for one per row (null: none for that row). A string
            is literal text, never a column's name. Beside a conversation with system messages of its
            own it comes before them.
        images
            Images of each row: the name of a column, an expression or a Series of Binary (the bytes), of
            String (a path, an http(s) address or a data URL), or a List of either. Null is none. PNG,
            JPEG, GIF and WebP, known by their first bytes. They belong to the prompt, or to the last
            message from the user. Files are read to compute keys, and again when they are sent; an
            address is not read: its text counts as the image.
        name
            Name of the column.
        output
            ``"value"`` gives {value}. ``"full"`` gives a Struct of value, status (Enum done,
            pending, failed), error, finish_reason, input_tokens, cached_input_tokens, output_tokens,
            cost_usd, model, job_id and key; for typed values also raw, the text as it came. Duplicate
            rows share a key: sum costs over unique keys.
        on_pending
            ``"raise"`` (default) submits what is missing and raises `JobsPending`. ``"wait"`` stays,
            with a progress bar; Ctrl+C stops the waiting, not the job. ``"null"`` submits, and gives
            what is there.
        on_error
            ``"null"`` (default): a failed request gives null, and one `LLMWarning` counts failures by
            kind. ``"raise"`` raises `RequestsFailed`.
        max_tokens
            Most output tokens of an answer, thinking included.
        temperature, top_p, stop, seed, reasoning_effort
            As the provider documents them. What you do not set is not sent.
        params
            Any other field of the request body.
        sample
            Ask the same thing again: each number is a request of its own. An int, or an expression of
            ints. With `seed`, sample *n* is sent with seed + *n*.
        retry_failed
            Send again what failed for good: an evaluation that finds no request of the column in flight
            does so, and those that collect do not. What failed for a passing reason is sent again anyway,
            alone, up to three times in all.
        max_cost
            The most that this evaluation may cost, in USD, what it has in flight included. What may pass
            it is not sent: `BudgetExceeded`. It is compared with a bound that holds (no more tokens than
            bytes, answers of `max_tokens`), so set `max_tokens`, too.
        retries_on_invalid
            How often a request is asked again whose answer does not fit {fits}. Each time is a request of
            its own, paid and kept; the first answer that fits counts. What never fits is failed, error
            ``invalid_output``.
        mode
            ``"batch"`` (default), or ``"realtime"``: answers in seconds at the full price, asked while
            this call waits. The same requests and the same cache: what a batch answered is not asked
            again, and what is pending in a batch stays there.
        max_concurrency
            With ``mode="realtime"``: most requests at once. Default: 32.

        Returns
        -------
        {returns}
            {what} Null prompts give null, unsent and unpaid; order and height never change.

        Raises
        ------
        ModelNotChosen, InvalidRequest
            At call: no model, an argument that cannot be sent, {refused}. {late}: a column that is
            not text, a conversation or an image that cannot be sent (the message names the row).
        JobsPending
            {late}, with ``on_pending="raise"``, while answers are missing.
        RequestsFailed
            {late}, with ``on_error="raise"``, if a request failed for good.
        BudgetExceeded
            {late}: it could cost more than `max_cost`, or than ``pllm.Config(max_cost=...)``. Nothing was
            sent.
        ProviderError, CacheError
            {late}: the provider said no, or the cache directory cannot be used. The message says what
            happened to the money.

        Notes
        -----
        Costs: one request for each distinct prompt (with its system prompt, parameters and sample)
        that was never answered, at the provider's batch price, half of the usual. Nothing for nulls,
        duplicates, cached answers and failed requests.
"""

_PUSHDOWN = """
        pushdown
            True: elementwise, so that only the rows that a query needs are asked; to be collected with
            ``lf.llm.collect()`` or on `pllm.Engine`. Default: True while that engine is the active one."""
_EAGER = "The first call submits it and raises `JobsPending`; a later call returns the answers."
_LAZY = "The first collect submits it and raises `JobsPending`; a later one returns the answers."
_TALK = """A row is text, or a whole conversation: a List or Array of
            structs of role and content; roles are system, developer, user and assistant."""

_GENERATE = {
    "task": "Ask a model one prompt a row; the answers come back as",
    "first": "prompt",
    "column": f"""A column's name, or an expression such as ``pl.format('Summarise: {{}}', 'text')``.
            {_TALK}""",
    "self": f" {_TALK}",
    "answers": "answers",
    "more": """
        schema
            What every answer must be: a pydantic model, a dataclass or TypedDict class, a `pl.Struct` or
            `pl.Schema`, a dict of names and dtypes or types, or a JSON Schema as a dict. The column is
            then a Struct with real dtypes (docs/schema.md). It is part of the key.""",
    "value": "a String column, or with `schema` a Struct",
    "fits": "its `schema`",
    "refused": "or a schema that the provider could not keep to: the message names the field",
}
_CLASSIFY = {
    "task": "Sort one text a row under one of several labels; they come back as",
    "first": "text",
    "column": "A column's name, or an expression of texts.",
    "self": "",
    "answers": "labels",
    "more": """
        labels
            A list of labels, an Enum class (its values), a `pl.Enum`, or a dict of labels and what each
            means. Their order and descriptions are part of the key. The model is told by a fixed text
            with the labels (docs/schema.md), followed by `system`.""",
    "value": "an Enum column of exactly these labels",
    "fits": "any label",
    "refused": "no labels, a set of them, blank ones, or labels that collide when case is folded",
}
_EMBED = {
    "column": "A column's name, or an expression of texts.",
    "self": "",
    "answers": "vectors",
    "page": """Turn texts into vectors, one a row; they come back as {gives}.

        The distinct texts that have no vector yet become one offline batch job, at half price.
        {when} Evaluating the same again resumes, and nothing is sent or paid twice.

        Parameters
        ----------
        text
            {prompt}{own}
        model
            For example ``"openai/text-embedding-3-small"``, or a model object. Default:
            ``pllm.Config(model=...)``, then the environment variable ``POLARS_LLM_MODEL``.
        dimensions
            How many numbers a vector has. Default: as many as the model's own have. The host is asked
            for shorter ones where it is fewer. A model that the library does not know needs it, or
            ``pllm.OpenAI(NAME, vector_length=...)``.
        name
            Name of the column.
        output
            ``"value"`` gives an Array(Float32, dimensions) column. ``"full"`` gives a Struct as
            `generate` does.
        on_pending, on_error, retry_failed, max_cost, mode, max_concurrency
            As for `generate`.
        params
            Any other field of the request body.

        Returns
        -------
        {returns}
            {what} Null texts give null, unsent and unpaid; order and height never change. The numbers
            are the bits of the provider's own Float32.

        Raises
        ------
        ModelNotChosen, InvalidRequest
            At call: no model, a provider without embeddings, a length that is not known or not to be
            had. {late}: a column that is not text.
        JobsPending
            {late}, with ``on_pending="raise"``, while vectors are missing.
        RequestsFailed
            {late}, with ``on_error="raise"``, if a request failed for good.
        BudgetExceeded
            {late}: it could cost more than `max_cost`, or than ``pllm.Config(max_cost=...)``. Nothing was
            sent.
        ProviderError, CacheError
            {late}: the provider said no, or the cache directory cannot be used. The message says what
            happened to the money.

        Notes
        -----
        Costs: the input tokens of each distinct text that has no vector yet, at the provider's batch
        price. Nothing for nulls, duplicates, cached vectors and failed requests.
""",
}


_VERBS: dict[str, tuple[Mapping[str, str], Callable[..., Any]]] = {
    "generate": (_GENERATE, verbs.generate),
    "classify": (_CLASSIFY, verbs.generate),
    "embed": (_EMBED, embeddings.embed),
}


def _on(type_: str, verb: Mapping[str, str]) -> dict[str, str]:
    """What is said differently on each Polars type."""
    answers = verb["answers"]
    words = {
        "DataFrame": {
            "gives": "a column",
            "when": _EAGER,
            "prompt": verb["column"],
            "what": "The frame with the column `name`.",
            "late": "At call",
        },
        "LazyFrame": {
            "gives": "a column",
            "when": _LAZY,
            "prompt": verb["column"],
            "what": "The lazy frame with the column `name`. Building and explaining it sends nothing.",
            "late": "At collect",
        },
        "Expr": {
            "gives": "an expression",
            "when": _LAZY,
            "prompt": f"The expression itself.{verb['self']}",
            "own": _PUSHDOWN,
            "what": f"The {answers}, named `name`; the whole column is asked at once.",
            "late": "When evaluated",
        },
        "Series": {
            "gives": "a Series",
            "when": _EAGER,
            "prompt": f"The series itself.{verb['self']}",
            "what": f"The {answers}, named `name`.",
            "late": "At call",
        },
    }
    return {"own": "", "returns": type_, **words[type_]}


def documented(type_: str) -> Callable[[F], F]:
    """Give a method named after a verb that verb's docstring, and the signature that it passes on.

    Parameters
    ----------
    type_
        The Polars type that it is a method on: "DataFrame", "LazyFrame", "Expr" or "Series".
    """

    def dress(method: F) -> F:
        verb, resolves = _VERBS[method.__name__]
        method.__doc__ = verb.get("page", _VERB).format_map(_Literal({**verb, **_on(type_, verb)}))
        own = inspect.signature(method)
        options = [p for p in inspect.signature(resolves).parameters.values() if p.kind is p.KEYWORD_ONLY]
        if method.__name__ == "classify":
            options = [p.replace(default="label") if p.name == "name" else p for p in options]
            options = [p for p in options if p.name != "schema"]
        first = [p for p in own.parameters.values() if p.kind is not p.VAR_KEYWORD]
        method.__signature__ = own.replace(parameters=[*first, *options])  # type: ignore[attr-defined]
        return method

    return dress


_ESTIMATE = """What a verb would send and cost. Nothing is sent.

        Parameters
        ----------
        prompt, *arguments, **options
            As for the verb.
        verb
            Its name: ``"generate"`` (default), ``"classify"``, ``"embed"``.
        count_tokens
            Your own counter, from a text to its number of tokens; called once for each request. Default:
            what the answers of this column in the cache took, or, where there are fewer than 10 of them, 4
            bytes of UTF-8 a token and 7 tokens a request.

        Returns
        -------
        DataFrame
            One row: ``rows``; ``nulls`` (rows without a prompt); ``unique`` requests, and of these
            ``cached``, ``in_flight``, ``failed`` (for good, not sent again) and ``to_send``; ``batches``;
            of what is to be sent ``input_tokens`` (an estimate), ``input_tokens_method``,
            ``output_tokens_max`` (null without `max_tokens`), ``cost_usd`` (answers as long as those in the
            cache, else as long as they may get) and ``cost_usd_max`` (a bound that holds: no more tokens
            than bytes; null where there are images). USD, at the price of the mode; null where it is not
            known, never 0.

        Raises
        ------
        ModelNotChosen, InvalidRequest
            {late}, as for the verb; another `verb`.
        UnansweredInput
            {late}: it reads answers that are not there yet.
        CacheError
            {late}: the cache directory cannot be read.

        Notes
        -----
        Costs nothing. The prompts are looked up in the cache and rendered, to count the batches. Prices are
        those that genai-prices lists, or the model object's own.
"""


def estimated(*, late: str) -> Callable[[F], F]:
    """Give a method the docstring of estimate.

    Parameters
    ----------
    late
        When it works: what stands before what it raises.
    """

    def dress(method: F) -> F:
        method.__doc__ = _ESTIMATE.replace("{late}", late)
        return method

    return dress


class _Literal(dict[str, str]):
    def __missing__(self, key: str) -> str:
        return "{" + key + "}"
