"""Random JSON schemas, of the kind that people write for structured outputs."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

Schema = dict[str, Any]

_names = st.text("abcdefgh_é", min_size=1, max_size=6)
_texts = st.text('abcXYZ 019-é"\\\n{}', max_size=8)
_scalars: st.SearchStrategy[Any] = st.none() | st.booleans() | st.integers(-1000, 1000) | _texts


@st.composite
def _strings(draw: st.DrawFn) -> Schema:
    least = draw(st.integers(0, 4))
    return draw(
        st.sampled_from(
            [
                {"type": "string"},
                {"type": "string", "minLength": least, "maxLength": least + 5},
                {"type": "string", "pattern": "^[a-c]{1,3}-[0-9]+$"},
                {"type": "string", "format": "date"},
            ]
        )
    )


@st.composite
def _numbers(draw: st.DrawFn) -> Schema:
    schema: Schema = {"type": draw(st.sampled_from(["integer", "number"]))}
    low = draw(st.integers(-500, 500))
    if draw(st.booleans()):
        schema["minimum"] = low
    if draw(st.booleans()):
        schema["maximum"] = low + draw(st.integers(1, 300))
    return schema


def _objects(inner: st.SearchStrategy[Schema]) -> st.SearchStrategy[Schema]:
    @st.composite
    def build(draw: st.DrawFn) -> Schema:
        properties = draw(st.dictionaries(_names, inner, max_size=4))
        schema: Schema = {"type": "object", "properties": properties}
        schema["required"] = [name for name in properties if draw(st.booleans())]
        schema["additionalProperties"] = draw(st.just(False) | inner)
        return schema

    return build()


def _arrays(inner: st.SearchStrategy[Schema]) -> st.SearchStrategy[Schema]:
    @st.composite
    def build(draw: st.DrawFn) -> Schema:
        schema: Schema = {"type": "array", "items": draw(inner)}
        least = draw(st.integers(0, 2))
        if draw(st.booleans()):
            schema |= {"minItems": least, "maxItems": least + draw(st.integers(0, 3))}
        return schema

    return build()


_leaves = (
    st.sampled_from([{"type": "boolean"}, {"type": "null"}])
    | _strings()
    | _numbers()
    | st.lists(_scalars, min_size=1, max_size=4).map(lambda values: {"enum": values})
    | _scalars.map(lambda value: {"const": value})
)

schemas: st.SearchStrategy[Schema] = st.recursive(
    _leaves,
    lambda inner: (
        _objects(inner)
        | _arrays(inner)
        | st.lists(inner, min_size=1, max_size=3).map(lambda many: {"anyOf": many})
    ),
    max_leaves=6,
)
