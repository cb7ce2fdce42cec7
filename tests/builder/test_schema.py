"""The committed JSON Schema agrees with the spec's classes and with the specs people write."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
import yaml

from enginesmith.spec_file import json_schema

ROOT = Path(__file__).parents[2]


def test_committed_schema_is_current() -> None:
    committed = (ROOT / "docs" / "spec.schema.json").read_text(encoding="utf-8")
    assert committed == json_schema(), "run: enginesmith schema > docs/spec.schema.json"


@pytest.mark.parametrize("spec", sorted((ROOT / "models").glob("*.yaml")), ids=lambda path: path.name)
def test_specs_of_the_project_validate(spec: Path) -> None:
    schema = json.loads(json_schema())
    jsonschema.Draft202012Validator.check_schema(schema)
    document = yaml.safe_load(spec.read_text(encoding="utf-8"))
    jsonschema.validate(document, schema)
    with pytest.raises(jsonschema.ValidationError, match="Additional properties"):
        jsonschema.validate({**document, "zzz": 1}, schema)
