"""The part of OpenLineage's JSON schema that Marrow's events use, version 2-0-2, and a check by it.

Written after openlineage.io/spec; each facet has its own version, as its `_schemaURL` says.
"""

import uuid
from datetime import datetime
from typing import Any
from urllib.parse import urlsplit

import jsonschema

FORMATS = jsonschema.FormatChecker(formats=())


@FORMATS.checks("uri", raises=ValueError)
def is_uri(text: str) -> bool:
    return bool(urlsplit(text).scheme) and " " not in text


@FORMATS.checks("uuid", raises=ValueError)
def is_uuid(text: str) -> bool:
    return str(uuid.UUID(text)) == text


@FORMATS.checks("date-time", raises=ValueError)
def is_time(text: str) -> bool:
    return datetime.fromisoformat(text).tzinfo is not None


def record(required: str = "", closed: bool = False, **properties: Any) -> dict[str, Any]:
    schema = {"type": "object", "properties": properties, "required": required.split()}
    return schema | ({"additionalProperties": False} if closed else {})


STRING, INTEGER = {"type": "string"}, {"type": "integer"}
URI = {"type": "string", "format": "uri"}


def facet(required: str = "", **properties: Any) -> dict[str, Any]:
    return record(f"_producer _schemaURL {required}", **properties, _producer=URI, _schemaURL=URI)


def facets(**known: Any) -> dict[str, Any]:
    return {"type": "object", "properties": known, "additionalProperties": facet()}


JOB = record("namespace name", namespace=STRING, name=STRING)
RUN_ID = {"type": "string", "format": "uuid"}
RUN_FACETS = facets(
    parent=facet("run job", run=record("runId", runId=RUN_ID), job=JOB),
    errorMessage=facet("message programmingLanguage", message=STRING, programmingLanguage=STRING),
    processing_engine=facet("version", version=STRING, name=STRING, openlineageAdapterVersion=STRING),
)
JOB_FACETS = facets(
    jobType=facet("processingType integration", processingType=STRING, integration=STRING, jobType=STRING)
)
FIELD = record("name", name=STRING, type=STRING, description=STRING, ordinal_position=INTEGER)
DATASET_FACETS = facets(
    schema=facet(fields={"type": "array", "items": FIELD}),
    dataSource=facet(name=STRING, uri=URI),
    version=facet("datasetVersion", datasetVersion=STRING),
)
COUNTS = {"rowCount": INTEGER, "fileCount": INTEGER}
QUALITY = facet("columnMetrics", columnMetrics={"type": "object"}, bytes=INTEGER, **COUNTS)
NAMES = {"namespace": STRING, "name": STRING, "facets": DATASET_FACETS}
INPUT = record("namespace name", True, **NAMES, inputFacets=facets(dataQualityMetrics=QUALITY))
STATISTICS = facet(size=INTEGER, **COUNTS)
OUTPUT = record("namespace name", True, **NAMES, outputFacets=facets(outputStatistics=STATISTICS))
RUN_EVENT = record(
    "eventTime producer schemaURL run job",
    True,
    eventType={"enum": ["START", "RUNNING", "COMPLETE", "ABORT", "FAIL", "OTHER"]},
    eventTime={"type": "string", "format": "date-time"},
    producer=URI,
    schemaURL={"const": "https://openlineage.io/spec/2-0-2/OpenLineage.json#/$defs/RunEvent"},
    run=record("runId", True, runId=RUN_ID, facets=RUN_FACETS),
    job=record("namespace name", True, namespace=STRING, name=STRING, facets=JOB_FACETS),
    inputs={"type": "array", "items": INPUT},
    outputs={"type": "array", "items": OUTPUT},
)
_VALIDATOR = jsonschema.Draft202012Validator(RUN_EVENT, format_checker=FORMATS)


def check(event: dict[str, Any]) -> None:
    """Raise jsonschema's ValidationError for what is no RunEvent."""
    _VALIDATOR.validate(event)
