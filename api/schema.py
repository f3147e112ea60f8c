"""The models as Kubernetes wants schemas: structural, every reference resolved.

For CustomResourceDefinitions
(https://kubernetes.io/docs/tasks/extend-kubernetes/custom-resources/custom-resource-definitions/#specifying-a-structural-schema)
and for the OpenAPI documents of the aggregated group.
"""

from datetime import timedelta
from typing import Any

from pydantic.json_schema import GenerateJsonSchema

from api.object import Model
from api.quantity import format_duration

_METADATA = {"type": "object"}


def structural(model: type[Model]) -> dict[str, Any]:
    """The model's schema without `$ref`, `title`, and null types: absent is the only way to be absent."""
    schema = model.model_json_schema(by_alias=True, mode="validation", schema_generator=_Generator)
    definitions = schema.pop("$defs", {})
    resolved = _resolve(schema, definitions)
    if "metadata" in resolved.get("properties", {}) and "ObjectMeta" in definitions:
        resolved["properties"]["metadata"] = dict(_METADATA)
    return resolved


class _Generator(GenerateJsonSchema):
    def encode_default(self, dft: Any) -> Any:
        """Durations as manifests have them; pydantic would write ISO 8601."""
        return format_duration(dft) if isinstance(dft, timedelta) else super().encode_default(dft)


def _resolve(schema: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    schema = dict(schema)
    while "$ref" in schema:
        target = definitions[schema.pop("$ref").rpartition("/")[2]]
        schema = {**target, **schema}
    if "anyOf" in schema and "x-kubernetes-int-or-string" not in schema:
        schema = _without_null(schema, definitions)
    schema.pop("title", None)
    if schema.get("default", ...) is None:
        del schema["default"]
    if "const" in schema:
        schema["enum"] = [schema.pop("const")]
    if "properties" in schema:
        schema["properties"] = {name: _resolve(value, definitions) for name, value in schema["properties"].items()}
    if "items" in schema:
        schema["items"] = _resolve(schema["items"], definitions)
    if isinstance(schema.get("additionalProperties"), dict):
        schema["additionalProperties"] = _resolve(schema["additionalProperties"], definitions)
    if "description" in schema:
        schema["description"] = " ".join(schema["description"].split())
    return schema


def _without_null(schema: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    choices = [choice for choice in schema.pop("anyOf") if choice != {"type": "null"}]
    if len(choices) != 1:
        raise TypeError(f"a structural schema has no alternatives: {choices}")
    return {**_resolve(choices[0], definitions), **schema}
