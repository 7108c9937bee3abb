"""What the description of the API promises, tried with hundreds of generated requests."""

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import positive_data_acceptance
from tiny_serve import running, tiny_service

# A request may take all a server gives; small bounds keep valid ones cheap.
LIMITS = {"max_n": 2, "max_samples": 8, "timeout_s": 20.0, "max_body_bytes": 2**14}
OPERATIONS = {
    "GET /generate/{request_id}/trajectory",
    "GET /health",
    "GET /metrics",
    "GET /ready",
    "GET /stats",
    "GET /v1/models",
    "GET /v1/models/{model_id}",
    "POST /compare",
    "POST /generate",
    "POST /score",
    "POST /v1/chat/completions",
    "POST /v1/completions",
}


def try_out(operation, mode, statuses):
    """Generated requests of one operation: as described (positive), or against it (negative)."""

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(
        max_examples=25,
        deadline=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
        derandomize=True,
        database=None,
    )
    def check(case):
        # What a schema cannot say (a prompt or a hole, steps that fit) may still be refused.
        # A request that gives itself no time gets a 504; any other 5xx is a fault.
        excluded = [positive_data_acceptance, not_a_server_error]
        response = case.call_and_validate(timeout=60, excluded_checks=excluded)
        assert response.status_code < 500 or response.status_code == 504, response.text
        assert response.status_code != 504 or case.body["timeout_s"] < 20
        statuses.add(response.status_code)

    check()


@pytest.mark.slow
def test_answers_are_as_described():
    """No 5xx, statuses and bodies as described, wrong requests refused."""
    seen: dict[str, set[int]] = {}
    with running(tiny_service(teacher=True, **LIMITS)) as url:
        schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
        for found in schema.get_all_operations():
            operation = found.ok()
            statuses = seen.setdefault(operation.label, set())
            try_out(operation, GenerationMode.POSITIVE, statuses)
            if operation.method == "post":
                try_out(operation, GenerationMode.NEGATIVE, statuses)
    assert seen.keys() == OPERATIONS
    assert 200 in seen["GET /stats"]
    for label, statuses in seen.items():
        if label.startswith("POST"):
            assert 400 in statuses, label
    assert any(200 in statuses for label, statuses in seen.items() if label.startswith("POST"))
