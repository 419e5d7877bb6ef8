"""A column of whole conversations -> prompts: what each row says, in the one form that is hashed and sent."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

import polars as pl

from polars_llm.errors import InvalidRequest
from polars_llm.request import conversation

__all__ = ["ROLES", "is_conversation", "told"]

ROLES = ("system", "developer", "user", "assistant")
"""Who can speak in a conversation."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Manners:
    """What a provider takes: who may speak, and whether the assistant may have the last word."""

    roles: tuple[str, ...] = ROLES
    prefill: bool = True


_ANY = _Manners()
_MANNERS: Mapping[str, _Manners] = {
    # platform.claude.com: roles of messages; a conversation that ends with the assistant is a 400
    "anthropic": _Manners(roles=("system", "user", "assistant"), prefill=False),
}

_TEXT = (pl.String, pl.Categorical, pl.Enum, pl.Null)
# Rows that are Python objects at once.
_STEP = 20_000
_HINT = "a message is a struct of role and content, both text. Nothing was sent."


def is_conversation(dtype: pl.DataType) -> bool:
    """Is a column of this type meant as conversations? (`told` says whether it is one.)"""
    return isinstance(dtype, (pl.List, pl.Array)) and isinstance(dtype.inner, pl.Struct)


def told(prompt: pl.Series, system: pl.Series | str | None, provider: str = "") -> pl.DataFrame:
    """Columns ``kind``, ``system`` and ``prompt`` of each row; all null where the conversation is.

    Parameters
    ----------
    prompt
        List or Array of Struct{role, content}.
    system
        The system prompt beside the conversations: text for all, String for one per row, or none.
    provider
        Who is asked.

    Raises
    ------
    InvalidRequest
        Another struct, an empty conversation, a message without role or content, a role or a last word
        that the provider does not take. The message names the row.
    """
    lists = prompt.arr.to_list() if isinstance(prompt.dtype, pl.Array) else prompt
    _check_fields(lists.dtype)
    manners = _MANNERS.get(provider, _ANY)
    parts = []
    for start in range(0, max(1, lists.len()), _STEP):
        part = lists.slice(start, _STEP)
        beside = system.slice(start, _STEP) if isinstance(system, pl.Series) else system
        roles, contents = _messages(part, start, manners)
        parts.append(_told(part, roles, contents, beside))
    return pl.concat(parts)


def _told(
    part: pl.Series, roles: list[str], contents: list[str], system: pl.Series | str | None
) -> pl.DataFrame:
    beside = system.to_list() if isinstance(system, pl.Series) else [system] * part.len()
    rows: list[tuple[str | None, str | None, str | None]] = []
    at = 0
    for count, given in zip(part.list.len().to_list(), beside, strict=True):
        if count is None:
            rows.append((None, None, None))
            continue
        rows.append(conversation(roles[at : at + count], contents[at : at + count], given))
        at += count
    names = ("kind", "system", "prompt")
    return pl.DataFrame(rows, schema=dict.fromkeys(names, pl.String), orient="row")


def _check_fields(dtype: pl.DataType) -> None:
    inner = dtype.inner if isinstance(dtype, pl.List) else None
    assert isinstance(inner, pl.Struct)
    fields = {field.name: field.dtype for field in inner.fields}
    if set(fields) != {"role", "content"} or not all(isinstance(t, _TEXT) for t in fields.values()):
        raise InvalidRequest(
            f"The prompt has dtype {dtype}, not List(Struct({{'role': String, 'content': String}}))",
            hint=_HINT,
        )


def _messages(part: pl.Series, start: int, manners: _Manners) -> tuple[list[str], list[str]]:
    """Roles and contents of all messages in a row, one conversation after the other."""
    empty = (part.list.len() == 0).fill_null(False).arg_true()
    if empty.len():
        raise InvalidRequest(f"Row {start + empty[0]}: the conversation is empty", hint=_HINT)
    whole = part.drop_nulls().explode(empty_as_null=False)
    roles, contents = (whole.struct.field(name).cast(pl.String) for name in ("role", "content"))
    ends = part.drop_nulls().list.len().cum_sum() - 1
    for at, why in _wrong(whole, roles, contents, ends, manners):
        row, message = _place(part, at)
        raise InvalidRequest(f"Row {start + row}, message {message}: {why}", hint=_HINT)
    return roles.to_list(), contents.to_list()


def _wrong(
    whole: pl.Series, roles: pl.Series, contents: pl.Series, ends: pl.Series, manners: _Manners
) -> Iterator[tuple[int, str]]:
    """Place among all messages, and what is wrong with it."""
    for at in whole.is_null().arg_true():
        yield at, "it is null"
    for at in roles.is_null().arg_true():
        yield at, "it has no role"
    for at in (~roles.is_in(manners.roles)).arg_true():
        yield at, f"the role is {roles[at]!r}; known are {', '.join(manners.roles)}"
    for at in contents.is_null().arg_true():
        yield at, "its content is null"
    last = roles.gather(ends)
    for n in last.is_in([] if manners.prefill else ["assistant"]).arg_true():
        yield ends[n], "the assistant has the last word, and this provider's models do not go on from there"
    if not manners.prefill:
        said = (roles != "system").cum_sum().gather(ends)
        for n in (said == said.shift(1, fill_value=0)).arg_true():
            yield ends[n], "only the system speaks, and this provider wants a message from the user"


def _place(part: pl.Series, at: int) -> tuple[int, int]:
    """Row and number of a message."""
    rows = pl.DataFrame({"row": pl.int_range(part.len(), eager=True), "message": part})
    rows = rows.drop_nulls("message").explode("message", empty_as_null=False)
    row = rows["row"][at]
    return row, at - int(rows["row"].search_sorted(row, side="left"))
