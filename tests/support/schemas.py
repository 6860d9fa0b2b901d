"""Fifty JSON schemas whose texts are short, of every kind that structured output promises; always the same ones."""

from typing import Any

Schema = dict[str, Any]


def _object(**properties: Schema) -> Schema:
    return {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}


def _array(items: Schema, least: int, most: int) -> Schema:
    return {"type": "array", "items": items, "minItems": least, "maxItems": most}


def _integer(low: int, high: int) -> Schema:
    return {"type": "integer", "minimum": low, "maximum": high}


def _text(most: int, **more: Any) -> Schema:
    return {"type": "string", "maxLength": most, **more}


WORD = {"enum": ["red", "green", "blue"]}
DIGIT = _integer(0, 9)
POINT = _object(x=_integer(-50, 50), y=_integer(-50, 50))

SCHEMAS: list[Schema] = [
    {"type": "null"},
    {"type": "boolean"},
    {"const": 42},
    {"const": {"a": [1, "é\n", None]}},
    WORD,
    {"enum": [1, "1", None, True, [], {"k": 0.5}]},
    DIGIT,
    _integer(-1000, 1000),
    _integer(17, 17),
    {"type": "integer", "exclusiveMinimum": 0, "exclusiveMaximum": 3},
    {"type": "integer", "minimum": 0, "maximum": 96, "multipleOf": 3},
    {"type": "number", "minimum": 0, "maximum": 99, "multipleOf": 0.01},
    _text(8),
    {"type": "string", "minLength": 3, "maxLength": 5},
    _text(0),
    {"type": "string", "pattern": "^[a-z]{1,6}$"},
    {"type": "string", "pattern": "^(\\d{3}-)?\\d{4}$"},
    {"type": "string", "pattern": "^[A-F0-9]+$", "minLength": 2, "maxLength": 6},
    {"type": "string", "pattern": "^(let|var) [a-z_]{1,4} = [0-9]{1,3};$"},
    {"type": "string", "format": "date"},
    {"type": "string", "format": "uuid"},
    {"type": "string", "format": "ipv4"},
    {"type": "string", "format": "time", "maxLength": 12},
    _array(DIGIT, 0, 4),
    _array(WORD, 2, 2),
    _array({"type": "boolean"}, 1, 3),
    _array(_array(DIGIT, 0, 2), 0, 3),
    _array(_text(4), 0, 3),
    {"type": "array", "prefixItems": [WORD, DIGIT, {"type": "null"}], "items": False, "minItems": 3},
    {"type": "array", "prefixItems": [DIGIT], "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
    _object(),
    _object(a=DIGIT),
    POINT,
    _object(name=_text(6), age=_integer(0, 120), tags=_array(WORD, 0, 2)),
    _object(outer=_object(middle=_object(inner=DIGIT))),
    {**_object(a=DIGIT, b=WORD, c={"type": "null"}), "required": ["b"]},
    {**_object(a=DIGIT, b=DIGIT), "required": []},
    {"type": "object", "additionalProperties": DIGIT, "properties": {"k": WORD}, "required": ["k"], "maxProperties": 1},
    {"type": "object", "patternProperties": {"^[a-c]$": DIGIT}, "additionalProperties": False, "maxProperties": 2},
    {"anyOf": [{"type": "null"}, DIGIT, WORD]},
    {"anyOf": [POINT, _array(DIGIT, 2, 2)]},
    {"oneOf": [_object(kind={"const": "a"}, n=DIGIT), _object(kind={"const": "b"}, s=_text(3))]},
    {"allOf": [{"type": "integer", "minimum": 5}, {"maximum": 8}]},
    {"type": ["integer", "null", "boolean"], "minimum": 0, "maximum": 99},
    {"$defs": {"point": POINT}, "$ref": "#/$defs/point"},
    {"$defs": {"w": WORD}, **_object(first={"$ref": "#/$defs/w"}, second={"$ref": "#/$defs/w"})},
    {"definitions": {"d": DIGIT}, **_array({"$ref": "#/definitions/d"}, 1, 3)},
    {"title": "T", "description": "described", "examples": ["x"], **_object(**{'we "ird\\ key': DIGIT, "é": WORD})},
    _object(value={"anyOf": [{"type": "null"}, {"type": "number", "minimum": -1, "maximum": 1, "multipleOf": 0.5}]}),
    _object(list=_array({"anyOf": [DIGIT, _object(d=DIGIT)]}, 1, 2), flag={"const": True}, note=_text(5)),
]
