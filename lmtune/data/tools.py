"""Tools and calls as rows write them, in one form: that of OpenAI's `tools` and `tool_calls`.

    read_tools({"tools": [{"type": "function", "function": {"name": "lamp", …}}]})     # or functions, or JSON text
    read_calls({"tool_calls": [{"function": {"name": "lamp", "arguments": "{\\"on\\": false}"}}]}, "messages[1]")

Arguments are a JSON object, written as such or as text; here they are text, and a template gets them as it wants them
(`lmtune.data.calls`). OpenAI's older `functions` and `function_call`, tools without the wrapping `function`, and the
JSON texts of sharegpt dumps say the same in other words.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from lmtune.data.types import ToolCall
from lmtune.data.values import RowFault, is_filled, kind_of, listed_keys, quoted, strings, unique_keys

TOOL_KEYS = ("tools", "functions")
CALL_KEYS = ("tool_calls", "function_call")
_MAX_DEPTH = 50  # of a tool or the arguments of a call
_CALL_PARTS = {"name", "arguments", "id", "type", "index", "function"}
_NULLS = (
    "a {} holds null: right if that is meant, but a table (Parquet) also writes null for a key that a row does not have"
)


def read_tools(row: Mapping[str, Any], warnings: list[str], prefix: str = "") -> tuple[str, ...]:
    """The tools of a row, each as JSON text; what is odd about them goes to `warnings`.

    Raises:
        RowFault: they are not tools.
    """
    given = [key for key in TOOL_KEYS if is_filled(row.get(key))]
    if not given:
        return ()
    if len(given) > 1:
        raise RowFault(f"both {prefix}tools and {prefix}functions; keep one")
    where = prefix + given[0]
    tools = _loaded(row[given[0]], where)
    if not isinstance(tools, list):
        raise RowFault(f"{where} is {kind_of(tools)}; it must be a list of tools")
    made: dict[str, str] = {}
    for index, tool in enumerate(tools):
        name, whole = _tool(tool, f"{where}[{index}]")
        if name in made:
            raise RowFault(f"{where}[{index}] is a second tool named {quoted(name)}; keep one")
        made[name] = json.dumps(whole, ensure_ascii=False)
        if _holds_null(whole):
            warnings.append(_NULLS.format("tool"))
    return tuple(made.values())


def _tool(tool: Any, where: str) -> tuple[str, dict[str, Any]]:
    """The tool's name, and the tool in OpenAI's form."""
    if not isinstance(tool, dict):
        raise RowFault(f"{where} is {kind_of(tool)}; it must be an object with type and function")
    if tool.get("type") not in (None, "function"):
        raise RowFault(f"{where}.type is {kind_of(tool['type'])}; only functions are known to chat templates")
    function = tool.get("function", {key: value for key, value in tool.items() if key != "type"})
    if not isinstance(function, dict):
        raise RowFault(f"{where}.function is {kind_of(function)}; it must be an object with name and parameters")
    inner = f"{where}.function." if "function" in tool else f"{where}."
    (name,) = strings(function, "name", prefix=inner, filled="name")
    if "arguments" in function:
        raise RowFault(f"{where} is a call, with arguments; a tool has a name, a description and parameters")
    _check_json(function, where)
    return name, {"type": "function", **{key: tool[key] for key in tool if "function" in tool}, "function": function}


def read_calls(turn: Mapping[str, Any], where: str, warnings: list[str]) -> tuple[ToolCall, ...]:
    """The calls of a turn of the assistant; a call without an id has "".

    Raises:
        RowFault: they are not calls, or their arguments are no JSON object.
    """
    given = [key for key in CALL_KEYS if is_filled(turn.get(key))]
    if not given:
        return ()
    if len(given) > 1:
        raise RowFault(f"{where} has both tool_calls and function_call; keep one")
    return calls_of(turn[given[0]], f"{where}.{given[0]}", warnings)


def calls_of(value: Any, where: str, warnings: list[str]) -> tuple[ToolCall, ...]:
    """The calls that a value says: one or a list, as JSON values or as text of JSON."""
    calls = _loaded(value, where)
    if isinstance(calls, dict):
        return (_call(calls, where, warnings),)
    if not isinstance(calls, list) or not calls:
        raise RowFault(f"{where} is {kind_of(calls)}; it must be a call with name and arguments, or a list of calls")
    return tuple(_call(call, f"{where}[{index}]", warnings) for index, call in enumerate(calls))


def _call(call: Any, where: str, warnings: list[str]) -> ToolCall:
    if not isinstance(call, dict):
        raise RowFault(f"{where} is {kind_of(call)}; it must be an object with a function")
    if call.get("type") not in (None, "function"):
        raise RowFault(f"{where}.type is {kind_of(call['type'])}; only calls of functions are known to chat templates")
    function = call.get("function", call)
    if not isinstance(function, dict):
        raise RowFault(f"{where}.function is {kind_of(function)}; it must be an object with name and arguments")
    inner = f"{where}.function." if "function" in call else f"{where}."
    (name,) = strings(function, "name", prefix=inner, filled="name")
    if "arguments" not in function and (others := function.keys() - _CALL_PARTS):
        raise RowFault(f"{where} has the keys {listed_keys(sorted(others))}; a call has name and arguments")
    arguments = _arguments(function.get("arguments"), f"{inner}arguments")
    if _holds_null(arguments):
        warnings.append(_NULLS.format("call"))
    number = call.get("id") or ""
    return ToolCall(name, json.dumps(arguments, ensure_ascii=False), *strings({"id": number}, "id", prefix=f"{where}."))


def _arguments(value: Any, where: str) -> dict[str, Any]:
    if value is None or (isinstance(value, str) and not value.strip()):
        return {}
    found = _loaded(value, where)
    if isinstance(found, str) and isinstance(value, str):
        raise RowFault(f"{where} is JSON text inside JSON text; write the object, or encode it once")
    if not isinstance(found, dict):
        raise RowFault(f"{where} is {kind_of(found)}; it must be a JSON object, or its text")
    _check_json(found, where)
    return found


def _loaded(value: Any, where: str) -> Any:
    """A JSON value that may be written as its text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value, object_pairs_hook=unique_keys, parse_float=_exact)
    except RowFault as fault:
        raise RowFault(f"{where}: {fault}") from None
    except (ValueError, RecursionError) as error:
        raise RowFault(f"{where} is {kind_of(value)}, which is not JSON: {error}") from None


def _exact(digits: str) -> float:
    """A number with a fraction or an exponent, which must not lose digits."""
    number = float(digits)
    if math.isfinite(number) and Decimal(digits) != Decimal(repr(number)):
        raise RowFault(f"the number {digits} has more digits than can be kept; write fewer, or a text")
    return number


def _check_json(value: Any, where: str, depth: int = 0) -> None:
    """Whether JSON and UTF-8 can hold `value`, and a template can write it."""
    if depth > _MAX_DEPTH:
        raise RowFault(f"{where} is nested deeper than {_MAX_DEPTH} levels; write a flatter object, or a text")
    if isinstance(value, float) and not math.isfinite(value):
        raise RowFault(f"{where} holds {value}, which JSON has not; write another number, or a text")
    if isinstance(value, str):
        strings({where: value}, where)
    elif isinstance(value, dict):
        for key, item in value.items():
            strings({where: key}, where)
            _check_json(item, where, depth + 1)
    elif isinstance(value, list):
        for item in value:
            _check_json(item, where, depth + 1)


def _holds_null(value: Any) -> bool:
    if isinstance(value, dict):
        return any(item is None or _holds_null(item) for key, item in value.items() if key != "default")
    return isinstance(value, list) and any(map(_holds_null, value))
