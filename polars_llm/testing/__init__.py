"""A local LLM provider for tests, demos and the terminal: no network, no key, no cost.

It speaks OpenAI's wire protocol (files, batches, chat completions, responses, embeddings) and
Anthropic's (messages, message batches), refuses what they refuse, keeps a bill, and goes wrong on
demand. It runs in a process of its own and shares no code with the rest of polars_llm.

    import polars as pl
    import polars_llm.testing

    def test_reviews_are_paid_once():
        with polars_llm.testing.provider() as p:
            df = pl.DataFrame({"prompt": ["Good?", "Good?", "Bad?"]})
            df.llm.generate("prompt", model="openai/gpt-6-luna", on_pending="wait")
            assert p.bill().billed == 2
            assert not p.bill().duplicates

Inside the block the SDKs' environment variables point at it; `p.env` holds them for subprocesses.
The pytest fixture `llm_provider` is the same without the `with`. In a terminal: `polars-llm emulate`.

**Who answers.** The built-in model: a sentence of the prompt; a value that obeys the JSON schema,
if there is one; a vector in which texts that share words lie close. Or a callable, run in your
process: `provider(model=lambda request: request.prompt.upper())`; `request` is a `ModelRequest`.

**Markers** in a prompt decide about its answer: ``[[fail:400]]`` (always), ``[[fail:500:2]]``
(twice, then an answer), ``[[expire]]``, ``[[refuse]]``, ``[[content_filter]]``, ``[[length]]``,
``[[empty]]``, ``[[tool]]``, ``[[say:some text]]``, ``[[separators]]`` (raw U+2028 and the like),
``[[case]]`` (letters in the other case), ``[[not_json]]``.

**Time.** A batch has ended when it is first looked at; `batch_seconds=5` makes it take five
seconds, `stepwise=True` one retrieval per state, `auto=False` as long as it takes you to call
`p.advance()` or `p.finish(fraction=0.5)`.

**Money.** Tokens are counted as UTF-8 bytes / 4, rounded up. 1 USD per million input tokens, 4 USD
per million output tokens, half of that in batches. Only requests answered with success are billed.

**What happened**: `p.bill()`, `p.batches()`, `p.requests(batch_id)` (what was asked in a batch),
`p.files()`, `p.log()` (method, path, status; the status is None where no reply was sent),
`p.exchanges()` (with headers and bodies). `p.reset()` forgets all of it. Another process reaches
the same provider with `Provider.attach(url)`.

**Faults**: `p.fault(kind, operation=..., times=1, after=0, **options)`. ``times=None`` is for ever.

=======================  ======================================================================
before it is accepted    ``status`` (status=500, message, code, type, retry_after, html=False),
                         ``drop``, ``kill`` (pid=None: the sender), ``hold`` (seconds=60),
                         ``slow`` (seconds=1); by default for every operation
                         ``not-found`` (status=404) for retrievals of batches,
                         ``gone`` (status=410) for result files
carried out, but then    ``create-then-500`` (status=500, and so on as ``status``),
                         ``create-then-drop``, ``create-then-kill`` (pid=None),
                         ``create-then-hold`` (seconds=60), ``create-then-garbage`` (cut JSON);
                         by default for the creation of batches, with `operation` for any
how a new batch goes     ``expire`` (fraction=0.5 answered), ``cancel`` (fraction=0.5),
                         ``fail`` (code=..., message=...), ``token-limit``,
                         ``list-lag`` (seconds=1), ``batch-seconds`` (seconds=1)
how a batch is shown     ``sparse`` (no counts), ``odd-status`` (status="paused"),
                         ``relative-url`` (of Anthropic's results)
bytes of a result file   ``truncate`` (share=0.5, framing="chunked", "length" or "close"),
                         ``crlf``, ``blank-lines``, ``duplicate-lines``,
                         ``foreign-ids`` (count=3), ``raw-separators``, ``lone-surrogates``,
                         ``string-body``, ``no-response``, ``missing-lines`` (count=1 or custom_id=...),
                         ``garbage-line``, ``no-final-newline``
=======================  ======================================================================

Operations: files.create, files.list, files.retrieve, files.content, files.delete, batches.create,
batches.list, batches.retrieve, batches.cancel, chat.completions.create, responses.create,
responses.input_tokens, embeddings.create, messages.create, messages.count_tokens,
messages.batches.create, messages.batches.list, messages.batches.retrieve, messages.batches.cancel,
messages.batches.delete, messages.batches.results, models.list. ``"*batches.create"`` is both
protocols, ``"files.content|*results"`` is either.

`p.fault` gives an id: for a hold, `p.held(id, seconds=5)` waits until a request is held, and
`p.release(id)` lets it go. `p.clear_faults()` forgets all.

Any API key is accepted, but for those that contain ``invalid``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .bill import Bill
    from .dialogue import ModelRequest
    from .handle import Provider, Seen, provider

__all__ = ["Bill", "ModelRequest", "Provider", "Seen", "provider"]

_HOMES = {
    "Bill": "bill",
    "ModelRequest": "dialogue",
    "Provider": "handle",
    "Seen": "handle",
    "provider": "handle",
}


def __getattr__(name: str) -> Any:
    # On first use: pytest imports the package of a plugin at every start, wanted or not.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
