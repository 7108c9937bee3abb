"""Guards: hosts, keys, sizes and headers, before anything else sees a request."""

import socket

import pytest
from tiny_serve import client, running, tiny_service

from mdm.serve.guards import OPEN_PATHS, host_name

KEYS = ["first-key-123", "second-key-456"]
PROMPT = {"prompt": "a", "gen_length": 2}


@pytest.fixture(scope="module")
def locked():
    service = tiny_service(max_body_bytes=1000)
    hosts = ["127.0.0.1", "localhost"]
    with running(service, keys=KEYS, hosts=hosts) as url, client(url) as http:
        yield http


def bearer(key):
    return {"authorization": f"Bearer {key}"}


def test_any_of_the_keys_opens_it(locked):
    for key in KEYS:
        assert locked.post("/generate", json=PROMPT, headers=bearer(key)).status_code == 200
        response = locked.get("/stats", headers={"authorization": f"bearer  {key}"})
        assert response.status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer"},
        bearer("first-key-12"),
        bearer("first-key-1234"),
        bearer("first-key-123, second-key-456"),
        {"authorization": "Basic first-key-123"},
        {"authorization": "first-key-123"},
        {"x-api-key": "first-key-123"},
        {"authorization": b"Bearer \xff\xfe"},
    ],
    ids=str,
)
def test_without_a_key_nothing_but_the_page_and_health(locked, headers):
    paths = ["/generate", "/score", "/compare", "/stats", "/metrics", "/openapi.json", "/v1/models"]
    for path in [*paths, "/generate/x/trajectory", "/v1/completions", "/nothing", "/web"]:
        response = locked.get(path, headers=headers)
        assert response.status_code == 401, path
        assert response.json()["error"]["code"] == "invalid_api_key"
        assert response.headers["www-authenticate"] == "Bearer"
        assert "key-123" not in response.text
    for path in OPEN_PATHS:
        assert locked.get(path, headers=headers).status_code == 200, path


@pytest.mark.parametrize(
    "path", ["/web/../generate", "/web/%2e%2e/stats", "/web/..%2fstats", "/web/%2e%2e%2fapp.py"]
)
def test_the_open_folder_is_no_way_in(locked, path):
    with socket.create_connection((locked.base_url.host, locked.base_url.port), timeout=30) as raw:
        raw.sendall(f"GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n".encode())
        answer = b"".join(iter(lambda: raw.recv(2**16), b""))
    assert answer.split()[1] in (b"401", b"404"), answer[:200]


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "", "127.0.0.1.evil.example"]
)
def test_another_name_is_turned_away(locked, host):
    response = locked.get("/health", headers={"host": host})
    assert response.status_code == 421
    assert response.json()["error"]["code"] == "wrong_host"


def test_names_with_ports(locked):
    assert host_name("[::1]:80") == "[::1]"
    assert host_name("LocalHost:80") == "localhost"
    assert locked.get("/health", headers={"host": "LOCALHOST:1"}).status_code == 200


def test_a_body_that_says_it_is_too_large(locked):
    response = locked.post("/generate", json={"prompt": "a" * 2000}, headers=bearer(KEYS[0]))
    assert response.status_code == 413
    assert "takes at most 1000" in response.json()["error"]["message"]


def test_a_body_that_does_not_say_how_large_it_is(locked):
    def endless():
        yield b'{"prompt": "'
        for _ in range(50):
            yield b"a" * 100
        yield b'"}'

    response = locked.post("/generate", content=endless(), headers=bearer(KEYS[0]))
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "body_too_large"
    assert locked.get("/health").status_code == 200


def test_a_client_that_goes_within_its_body(locked):
    for _ in range(3):
        with socket.create_connection((locked.base_url.host, locked.base_url.port)) as raw:
            head = (
                f"POST /generate HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {KEYS[0]}\r\n"
            )
            head += "content-type: application/json\r\ncontent-length: 500\r\n\r\n{"
            raw.sendall(head.encode())
    assert locked.post("/generate", json=PROMPT, headers=bearer(KEYS[0])).status_code == 200


def test_every_answer_has_the_headers_that_keep_a_browser_safe(locked):
    for response in (
        locked.get("/"),
        locked.get("/nothing"),
        locked.get("/stats", headers=bearer(KEYS[0])),
        locked.get("/health", headers={"host": "evil.example"}),
    ):
        policy = response.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert response.headers["x-content-type-options"] == "nosniff"


def test_no_more_requests_than_allowed_are_open():
    service = tiny_service(max_rows=1, max_queue=0)  # four requests at a time
    with running(service) as url, client(url) as http:
        address = (http.base_url.host, http.base_url.port)
        raws = [socket.create_connection(address) for _ in range(4)]
        for raw in raws:
            raw.sendall(
                b"POST /generate HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
                b"content-length: 100\r\n\r\n{"
            )
        response = http.post("/generate", json=PROMPT)
        while response.status_code == 200:  # the last of the four has not been read yet
            response = http.post("/generate", json=PROMPT)
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "too_many_connections"
        assert http.get("/health").status_code == 200
        for raw in raws:
            raw.close()
        while http.post("/generate", json=PROMPT).status_code != 200:
            pass


def test_refusals_are_counted_once(locked):
    def counted():
        text = locked.get("/metrics", headers=bearer(KEYS[0])).text
        return {
            line.rpartition(" ")[0]: float(line.rpartition(" ")[2])
            for line in text.splitlines()
            if line.startswith("mdm_requests_total")
        }

    before = counted()
    locked.get("/stats")
    locked.post("/generate", content=(b"x" * 600 for _ in range(9)), headers=bearer(KEYS[0]))
    grown = {key: value - before.get(key, 0) for key, value in counted().items()}
    assert {key.partition("{")[2]: value for key, value in grown.items() if value} == {
        'endpoint="refused",outcome="invalid_api_key"}': 1,
        'endpoint="refused",outcome="body_too_large"}': 1,
    }


def test_a_page_of_a_stranger_cannot_make_a_browser_ask():
    """Without a key, a simple request of a browser would not be asked about before (CSRF)."""
    with running(tiny_service(), origins=[ORIGIN]) as url, client(url) as http:
        own = str(http.base_url).rstrip("/")
        for origin, status in ((None, 200), (own, 200), (ORIGIN, 200), ("null", 403),
                               ("https://evil.example", 403), ("http://localhost:1", 403)):  # fmt: skip
            headers = {} if origin is None else {"origin": origin}
            assert http.post("/generate", json=PROMPT, headers=headers).status_code == status, (
                origin
            )
        assert http.get("/health", headers={"origin": "https://evil.example"}).status_code == 200
        without_type = http.post("/generate", content=b'{"prompt": "a", "gen_length": 2}')
        assert without_type.status_code == 400


ORIGIN = "https://lab.example"


def test_other_origins_only_if_allowed(locked):
    asks = {"origin": ORIGIN, "access-control-request-method": "POST"}
    asks["access-control-request-headers"] = "authorization,content-type"
    assert "access-control-allow-origin" not in locked.options("/generate", headers=asks).headers
    with running(tiny_service(), keys=KEYS, origins=[ORIGIN]) as url, client(url) as http:
        allowed = http.options("/generate", headers=asks)
        assert allowed.status_code == 200
        assert allowed.headers["access-control-allow-origin"] == ORIGIN
        other = http.options("/generate", headers={**asks, "origin": "https://evil.example"})
        assert "access-control-allow-origin" not in other.headers
        for key, status in ((KEYS[0], 200), ("wrong", 401)):
            headers = {**bearer(key), "origin": ORIGIN}
            answer = http.post("/generate", json=PROMPT, headers=headers)
            assert answer.status_code == status
            assert answer.headers["access-control-allow-origin"] == ORIGIN
        assert answer.headers["access-control-expose-headers"] == "retry-after"
